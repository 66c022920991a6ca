"""Bits per tensor by measured KL, under a budget of bits for the whole file."""
