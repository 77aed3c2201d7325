"""What each command of `src/` does."""
