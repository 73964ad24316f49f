"""All compiled kernels; importing this compiles them, so only `runtime.load_kernels` does."""

from ..numba.staging import part_width
from . import cpu_backward, cpu_forward
from .cpu_problem import Problem

__all__ = ["Problem", "cpu_backward", "cpu_forward", "part_width"]
