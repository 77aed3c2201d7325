"""What is typed: the command line, what Hydra composes of it, the identity of a run."""
