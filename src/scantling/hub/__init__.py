"""Hugging Face models in and out: one family a class, its settings and tensors in tables read both ways."""
