"""P and V steps of quantised weights (arXiv 2405.14852), whatever the loss."""
