"""All compiled kernels; importing this compiles them, so only `runtime.load_kernels` does."""

from ..numba import staging
from . import cpu_backward, cpu_forward

__all__ = ["cpu_backward", "cpu_forward", "staging"]
