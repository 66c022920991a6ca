"""Layers of torch whose weights live in codes."""
