"""The OpenAI protocol over the embedded engine."""
