"""GPU kernels: the layout they read, which one runs, and the kernels."""
