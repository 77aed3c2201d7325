"""A report as data, and the page, files and W&B report that show it."""
