"""vLLM's own server with our plugin."""
