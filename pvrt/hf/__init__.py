"""The format in transformers."""
