"""The CPU backend: Numba kernels as torch custom ops."""

from .decay_rule import decay_rule_cpu

__all__ = ["decay_rule_cpu"]
