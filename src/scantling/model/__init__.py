"""The decoder and its parts, in pure PyTorch: one module per group of `conf/`."""
