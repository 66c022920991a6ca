"""Calibration, block by block."""
