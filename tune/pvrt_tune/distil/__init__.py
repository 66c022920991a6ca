"""PV-Tuning of the whole model against the original (arXiv 2405.14852)."""
