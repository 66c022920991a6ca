"""The format in vLLM."""
