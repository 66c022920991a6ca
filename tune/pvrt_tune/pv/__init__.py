"""PV-Tuning (arXiv 2405.14852) of the whole model."""
