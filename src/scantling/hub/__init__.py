"""Hugging Face models in and out: one family a class, its settings and tensors in tables that read
both ways.
"""
