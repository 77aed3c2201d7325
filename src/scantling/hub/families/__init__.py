"""One class a family, related ones in one file."""
