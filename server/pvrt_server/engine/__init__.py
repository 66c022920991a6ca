"""The embedded engine: one model, many requests at once."""
