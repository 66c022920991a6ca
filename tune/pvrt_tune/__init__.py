"""From a dense model to a PV-tuned AQLM checkpoint."""
