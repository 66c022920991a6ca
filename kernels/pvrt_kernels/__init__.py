"""Decoding of additive-codebook (AQLM) weights: tensors in, tensors out.

Knows nothing of models, files or servers. `aqlm_linear`, `aqlm_embedding` and
`aqlm_dequantize` (and `aqlm_parameter_grads` for training loops) are the whole interface, with
`packed` for models that only run; `dispatch` is where a kernel for a device or scheme plugs in.
"""

from pvrt_kernels.cpu import products
from pvrt_kernels.dispatch import has_fast_kernel
from pvrt_kernels.gpu import launch
from pvrt_kernels.ops import (
    aqlm_dequantize,
    aqlm_embedding,
    aqlm_linear,
    aqlm_parameter_grads,
)

__all__ = [
    "aqlm_dequantize",
    "aqlm_embedding",
    "aqlm_linear",
    "aqlm_parameter_grads",
    "has_fast_kernel",
]

products.register()
launch.register()
