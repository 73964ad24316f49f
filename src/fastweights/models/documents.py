"""Padding and borders of documents: what a model is told about its tokens in transformers' several ways, as one.

Notation: B batch, T new tokens, L tokens so far, the new ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from fastweights.models.cache import FastWeightsCache


def find_starts(
    shape: tuple[int, int],
    *,
    past: int,
    real: Bool[Tensor, "B T"] | None,
    position_ids: Int[Tensor, "B T"] | None = None,
    cu_seq_lens: Int[Tensor, " bounds"] | None = None,
    seq_idx: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B T"] | None:
    """Where documents begin that are packed into one row, other than at the row's own beginning; None if none does.

    Args:
        shape: (B, T).
        past: tokens before these.
        real: False where a token is padding.
        position_ids: a document begins at each real token whose position is not larger than that of the real token
            before it, and at position 0 after other tokens.
        cu_seq_lens: 0, and where each document of a single row ends, as flash-attention takes them.
        seq_idx: number of the document that each token belongs to, as Mamba's kernels take them.
    """
    found = []
    if position_ids is not None:
        found.append(_by_positions(position_ids.expand(shape), past, real))
    if cu_seq_lens is not None:
        found.append(_by_bounds(cu_seq_lens, shape))
    if seq_idx is not None:
        changes = torch.zeros(shape, dtype=torch.bool, device=seq_idx.device)
        changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        found.append(changes)
    if not found:
        return None
    starts = found[0]
    for others in found[1:]:
        starts = starts | others
    if real is not None:
        starts = starts & real
    return starts if starts.any() else None


def _by_positions(position_ids: Tensor, past: int, real: Tensor | None) -> Bool[Tensor, "B T"]:
    starts = torch.zeros(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    before = position_ids if real is None else _of_last_real(position_ids, real)
    starts[:, 1:] = position_ids[:, 1:] <= before[:, :-1]
    if past:
        starts[:, 0] = position_ids[:, 0] == 0
    return starts


def _of_last_real(position_ids: Tensor, real: Tensor) -> Int[Tensor, "B T"]:
    """Position of the last real token up to each place; -1 where there is none."""
    places = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
    return position_ids.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)


def _by_bounds(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Bool[Tensor, "B T"]:
    B, T = shape
    if B != 1:
        raise FastWeightsError(f"cu_seq_lens was given with {B} rows; packed documents lie in one row")
    starts = torch.zeros(shape, dtype=torch.bool, device=cu_seq_lens.device)
    inner = cu_seq_lens[1:-1].long()
    starts[0, inner[inner < T]] = True
    return starts


def real_tokens(
    attention_mask: Tensor | None, cache: FastWeightsCache | None, past: int, length: int
) -> Bool[Tensor, "B T"] | None:
    """Which of the new tokens are no padding; None if none is padding, nor any before them.

    Args:
        attention_mask: as a model is given it.
        cache: what was read before; it is told whether padding has been among the tokens.
        past: tokens before the new ones.
        length: T.

    Raises:
        FastWeightsError: if the mask is of another shape, or leaves out earlier padding.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise FastWeightsError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; fast weights take (batch, length) masks"
        )
    padded = attention_mask is not None and not attention_mask.all()
    if cache is not None:
        covers = attention_mask is not None and attention_mask.shape[1] == past + length
        if past and cache.padded and not covers:
            given = "none" if attention_mask is None else f"one of length {attention_mask.shape[1]}"
            raise FastWeightsError(
                f"attention_mask is {given}, and among the {past} tokens before these {length} was padding: give one "
                f"for all of them, of length {past + length}"
            )
        cache.padded = padded
    return attention_mask[:, -length:].bool() if padded else None  # type: ignore[index]


def positions_within(starts: Bool[Tensor, "B T"], real: Bool[Tensor, "B T"] | None, past: int) -> Int[Tensor, "B T"]:
    """How many real tokens of its document come before each one; `past` more in the document that goes on."""
    seen = (torch.ones_like(starts) if real is None else real).long().cumsum(1) - 1
    first = torch.where(starts, seen, -past).cummax(1).values
    return (seen - first).clamp(min=0)


def positions_of(attention_mask: Int[Tensor, "B L"] | Bool[Tensor, "B L"], length: int, past: int) -> Tensor:
    """How many real tokens come before each new one, so that padding on the left shifts nothing."""
    seen = attention_mask.long().cumsum(-1) - 1
    if attention_mask.shape[1] == length:
        seen = seen + past
    return seen[:, -length:].clamp(min=0)


def documents_mask(starts: Bool[Tensor, "B T"], real: Bool[Tensor, "B T"] | None, dtype: torch.dtype) -> Tensor:
    """What softmax attention adds to q·k, (B, 1, T, T): 0 where a token sees another of its document, else -max."""
    document = starts.cumsum(1)
    T = starts.shape[1]
    seen = document[:, :, None] == document[:, None, :]
    seen = seen & torch.ones(T, T, dtype=torch.bool, device=starts.device).tril()
    if real is not None:
        seen = seen & real[:, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=starts.device).masked_fill(~seen, torch.finfo(dtype).min)[
        :, None
    ]


def next_real_tokens(
    input_ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], starts: Bool[Tensor, "B T"] | None, no_label: int
) -> Int[Tensor, "B T"]:
    """The token that follows each real position in its document, padding left out; `no_label` where none does."""
    T = input_ids.shape[1]
    places = torch.where(real, torch.arange(T, device=real.device), T)
    following = torch.nn.functional.pad(places[:, 1:], (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    tokens = input_ids.gather(1, following.clamp(max=T - 1))
    missing = ~real | (following == T)
    if starts is not None:
        missing = missing | starts.gather(1, following.clamp(max=T - 1))
    return tokens.masked_fill(missing, no_label)
