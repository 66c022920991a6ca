"""CPU kernels: a C library (csrc/) and what calls it."""
