"""What measures, compares and describes models."""
