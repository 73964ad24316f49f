"""All compiled kernels; importing this compiles them, so only `runtime.load_kernels` does."""

from . import decay_backward, decay_forward, staging

__all__ = ["decay_backward", "decay_forward", "staging"]
