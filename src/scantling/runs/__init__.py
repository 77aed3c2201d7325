"""The directory of a run, and tables of many."""
