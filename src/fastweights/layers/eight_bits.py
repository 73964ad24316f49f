"""EightBits: numbers in eight bits with a power of two for each 32 of them, as the microscaling format MXINT8 has it.

That is the Open Compute Project's "Microscaling Formats Specification" v1.0 (Rouhani et al., arXiv 2310.10537), but for
its least exponents, of which one stands for numbers that are not finite. As scales are powers of two, what has been
rounded is exact in the dtype that it came from, bfloat16 too, and stays what it is however often it is rounded again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from fastweights.layers.linear import needs_derivatives

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int8
    from torch import Tensor

BLOCK = 32
"""Numbers that share an exponent; the last ones of a row may be fewer."""
_MOST = 127
_LEAST_EXPONENT = -100
"""Blocks of smaller numbers are 0, which lets their scales be normal numbers in float32."""
_GREATEST_EXPONENT = 127
_NOT_FINITE = -128
_NAN = 0x7FC00000
"""Its bits in float32."""
_SEQUENCE = 0xD1B54A33, 0xABC98389, 0x8CB92BA7
"""Of a row, a column and a token, in 2^32nds: the R3 sequence of M. Roberts ("The Unreasonable Effectiveness of
Quasirandom Sequences"), the powers of 1 / 1.2207 that fill a cube most evenly."""


class EightBits(NamedTuple):
    """Rounded numbers: codes of n numbers times 2^(exponent - 6) of their block."""

    codes: Int8[Tensor, "... n"]
    exponents: Int8[Tensor, "... blocks"]
    """From -100 on; -128 stands for a block with a number that is not finite: it is all NaN."""
    dtype: torch.dtype
    """Of the numbers."""

    @classmethod
    @torch.no_grad()
    def of(cls, x: Float[Tensor, "... n"], token: int | None = None) -> EightBits:
        """The nearest there are, or dithered.

        A number that changes by little at a time, as a state that decays, would be rounded to what it was, over and
        over. Dithered it is the next lower or the next higher one, by how near it is to each and by a pattern of its
        place and the token, so that what is rounded away over many tokens adds up to nothing.

        Args:
            x: the numbers; of what is dithered the last two dimensions are a matrix.
            token: number of the last one whose state this is; None for the nearest numbers.
        """
        blocks = _in_blocks(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        most = blocks.abs().amax(-1).float()
        exponents = torch.frexp(most).exponent - 1
        exponents = exponents.masked_fill(most == 0, _LEAST_EXPONENT).clamp(min=_LEAST_EXPONENT)
        if token is not None:
            # One beyond 127 would be cut off each time, and could not grow by little.
            exponents = (exponents + (most > _MOST * _scales(exponents)).int()).clamp(max=_GREATEST_EXPONENT)
        # The largest would be rounded to 128, which eight bits do not have; what a NaN is rounded to is nobody's.
        codes = blocks / _scales(exponents)[..., None]
        if token is None:
            codes = codes.round_()
        else:  # of both signs alike, as next to a power of two one is not right after the other
            codes = torch.copysign(codes.abs().add_(_in_blocks(dither(x, token))).floor_(), codes)
        codes = codes.clamp_(-_MOST, _MOST).to(torch.int8)
        exponents = exponents.masked_fill(~most.isfinite(), _NOT_FINITE).to(torch.int8)
        # A view of codes with zeros behind them would keep these in memory.
        return cls(codes.flatten(-2)[..., : x.shape[-1]].contiguous(), exponents, x.dtype)

    def numbers(self) -> Float[Tensor, "... n"]:
        """What they stand for."""
        numbers = _in_blocks(self.codes) * _scales(self.exponents.int())[..., None]
        return numbers.flatten(-2)[..., : self.codes.shape[-1]].to(self.dtype)

    def is_finite(self) -> bool:
        """Whether all are, by exponents that there are."""
        return not bool((self.exponents < _LEAST_EXPONENT).any())

    def change(self, change: Callable[[Tensor], Tensor]) -> EightBits:
        """With codes and exponents, whose rows are alike, by what `change` makes of them."""
        return EightBits(change(self.codes), change(self.exponents), self.dtype)


def dither(x: Float[Tensor, "*_ m n"], token: int) -> Float[Tensor, "m n"]:
    """From 0 up to 1, for each place of a matrix: over the tokens as evenly as can be.

    In sixteen bits, so that a whole number of up to 127 is exact with it, and its floor is that number.
    """
    of_row, of_column, of_token = _SEQUENCE
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    places = (rows * of_row)[:, None] + columns * of_column + token * of_token % 2**32
    return (places % 2**32 >> 16).float() * 2.0**-16


def _in_blocks(x: Tensor) -> Tensor:
    """(..., blocks, 32), with zeros where the last ones of a row are fewer."""
    missing = -x.shape[-1] % BLOCK
    return (pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, BLOCK))


def _scales(exponents: Tensor) -> Tensor:
    """2^(exponent - 6) in float32, put together of its bits, as powers are not exact everywhere."""
    bits = (exponents + (127 - 6)) << 23
    return bits.masked_fill(exponents == _NOT_FINITE, _NAN).view(torch.float32)


def rounded(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """x in eight bits; gradients pass as if it were not rounded."""
    near = EightBits.of(x).numbers()
    # Exact, as what is so near to x differs from it by a number of its dtype.
    return x + (near - x).detach() if needs_derivatives(x) else near
