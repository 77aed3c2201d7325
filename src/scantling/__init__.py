"""Scantling measures the parts of decoder-only language models."""

__version__ = "0.2.0"
