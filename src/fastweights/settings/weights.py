"""In how many bits matrices are kept."""

from typing import Literal, get_args

Weights = Literal["fp32", "bf16", "int8", "int4"]
"""fp32 leaves them as they are; int8 has a scale for each row, int4 scale and offset for groups of 32, but
int8 for the unembedding and for converted attention."""
WEIGHTS: tuple[str, ...] = get_args(Weights)
