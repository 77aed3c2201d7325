"""A stored run opened again: its loss on text, text that it writes, views of what it learned."""
