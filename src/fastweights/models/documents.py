"""Padding and borders of documents: what a model is told about its tokens in transformers' several ways, as one.

Notation: B batch, T new tokens, L tokens so far, the new ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from fastweights.errors import FastWeightsError
from fastweights.layers.rules import TokenMarks
from fastweights.layers.window import token_index
from fastweights.models.architectures import local_windows
from fastweights.ops.checks import sequence_bounds

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedConfig

    from fastweights.models.cache import FastWeightsCache


class Reading(NamedTuple):
    """What a model is to know about the tokens of one call."""

    mask: Bool[Tensor, "B L"] | None
    """False where a token is padding, of all so far; None if none is."""
    position_ids: Int[Tensor, "_ T"] | None
    """Of the new tokens, in their documents; None for the base model's own numbering."""
    marks: TokenMarks
    """Padding and borders among the new tokens."""


def read_tokens(
    shape: tuple[int, int],
    cache: FastWeightsCache | None,
    *,
    attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
    position_ids: Int[Tensor, "_ T"] | None = None,
    cu_seq_lens: Int[Tensor, " bounds"] | None = None,
    seq_idx: Int[Tensor, "B T"] | None = None,
    document_starts: Bool[Tensor, "B T"] | None = None,
) -> Reading:
    """All that a model was told about its tokens, as one.

    Args:
        shape: (B, T).
        cache: what was read before.
        attention_mask: 0 where a token is padding, for all tokens so far, or for the new ones if none before was.
        position_ids: a document begins at each real token whose position is not larger than that of the real token
            before it, and at position 0 after other real tokens.
        cu_seq_lens: 0, and where each document of a single row ends, as flash-attention takes them.
        seq_idx: number of the document that each token belongs to, as Mamba's kernels take them.
        document_starts: True where a document begins.

    Raises:
        FastWeightsError: if these cannot be what was meant.
    """
    if 0 in shape:
        raise FastWeightsError(f"{shape[0]} rows of {shape[1]} tokens were given; a model reads at least one of each")
    past = 0 if cache is None else cache.get_seq_length()
    mask = _whole_mask(attention_mask, cache, past, shape)
    real = None if mask is None else mask[:, -shape[1] :]
    if past and (cu_seq_lens is not None or seq_idx is not None):
        raise FastWeightsError(
            f"{'seq_idx' if cu_seq_lens is None else 'cu_seq_lens'} was given after {past} other tokens, of which it "
            "says nothing: give position_ids, which start anew with each document"
        )
    if past and cache is not None and cache.several_documents and position_ids is None:
        raise FastWeightsError(
            f"among the {past} tokens before were several documents: give position_ids, as the number of tokens before "
            "these does not say where in its document each row is"
        )
    found = [document_starts]
    if position_ids is None and mask is not None:
        position_ids = (mask.long().cumsum(-1) - 1)[:, -shape[1] :].clamp(min=0)
    elif position_ids is not None:
        found.append(_by_positions(position_ids.expand(shape), mask, past))
    found.append(None if cu_seq_lens is None else _by_bounds(cu_seq_lens, shape))
    found.append(None if seq_idx is None else _by_number(seq_idx, shape))
    starts = _any_of([x for x in found if x is not None], real)
    if starts is not None and position_ids is None:
        position_ids = _positions_within(starts, real) + past * (starts.cumsum(1) == 0)
    position_ids = _after_what_was_read(position_ids, starts, cache, shape)
    return Reading(mask, position_ids, TokenMarks(real, starts))


def _whole_mask(
    attention_mask: Tensor | None, cache: FastWeightsCache | None, past: int, shape: tuple[int, int]
) -> Bool[Tensor, "B L"] | None:
    """Over all tokens so far; None if none is padding."""
    (B, T), padded = shape, cache is not None and past > 0 and cache.padded
    given = "none" if attention_mask is None else f"of shape {tuple(attention_mask.shape)}"
    if attention_mask is not None and attention_mask.ndim != 2:
        raise FastWeightsError(f"attention_mask is {given}; fast weights take (batch, length) masks")
    if attention_mask is not None and tuple(attention_mask.shape) not in {(B, T), (B, past + T)}:
        more = f", or {(B, past + T)} with those before them" if past else ""
        raise FastWeightsError(f"attention_mask is {given}; it must be {(B, T)}, of the new tokens{more}")
    if padded and (attention_mask is None or attention_mask.shape[1] != past + T):
        raise FastWeightsError(
            f"attention_mask is {given}, and among the {past} tokens before these {T} was padding: give one for all of "
            f"them, of length {past + T}"
        )
    if attention_mask is None or attention_mask.all():
        return None
    return pad(attention_mask.bool(), (past + T - attention_mask.shape[1], 0), value=True)


def _any_of(found: list[Tensor], real: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B T"] | None:
    if not found:
        return None
    starts = found[0]
    for others in found[1:]:
        starts = starts | others
    starts = starts if real is None else starts & real
    return starts if starts.any() else None


def _by_positions(position_ids: Tensor, mask: Tensor | None, past: int) -> Bool[Tensor, "B T"]:
    if mask is None:
        # As if the token before were one at position 0: only a 0 is not larger.
        first = position_ids.new_full((len(position_ids), 1), 0 if past else -1)
        return position_ids <= torch.cat((first, position_ids[:, :-1]), 1)
    T = position_ids.shape[1]
    real, read = mask[:, -T:], mask[:, :-T].any(1, keepdim=True)
    before = _of_last_real(position_ids, real)[:, :-1]
    before = pad(before, (1, 0), value=-1)
    return position_ids <= torch.where((before < 0) & read, 0, before)


def _of_last_real(position_ids: Tensor, real: Tensor) -> Int[Tensor, "B T"]:
    """Position of the last real token up to each place; -1 where there is none."""
    places = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
    return position_ids.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)


def _by_bounds(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Bool[Tensor, "B T"]:
    B, T = shape
    if B != 1:
        raise FastWeightsError(f"cu_seq_lens was given with {B} rows; packed documents lie in one row")
    try:
        bounds = sequence_bounds(cu_seq_lens, T)
    except ValueError as error:
        raise FastWeightsError(str(error).replace("cu_seqlens", "cu_seq_lens")) from error
    starts = torch.zeros(shape, dtype=torch.bool, device=cu_seq_lens.device)
    starts[0, [start for start, end in bounds if 0 < start < end]] = True
    return starts


def _by_number(seq_idx: Tensor, shape: tuple[int, int]) -> Bool[Tensor, "B T"]:
    if tuple(seq_idx.shape) != shape:
        raise FastWeightsError(f"seq_idx is of shape {tuple(seq_idx.shape)}; it must be {shape}, as the tokens are")
    starts = torch.zeros(shape, dtype=torch.bool, device=seq_idx.device)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def _positions_within(starts: Bool[Tensor, "B T"], real: Bool[Tensor, "B T"] | None) -> Int[Tensor, "B T"]:
    """How many real tokens of its document come before each one."""
    seen = (torch.ones_like(starts) if real is None else real).long().cumsum(1) - 1
    return (seen - torch.where(starts, seen, 0).cummax(1).values).clamp(min=0)


def _after_what_was_read(
    position_ids: Tensor | None, starts: Tensor | None, cache: FastWeightsCache | None, shape: tuple[int, int]
) -> Int[Tensor, "_ T"] | None:
    """Positions go on from those of a memory, which began long before what its cache is said to hold."""
    if cache is None or not cache.position_offset:
        return position_ids
    if position_ids is None:
        past = cache.get_seq_length()
        place = starts.device if starts is not None else cache.device
        position_ids = torch.arange(past, past + shape[1], device=place)[None]
    goes_on = 1 if starts is None else (starts.cumsum(1) == 0).long()
    return position_ids + cache.position_offset * goes_on


class Numbers(NamedTuple):
    """Which document each token is of, by numbers that grow, and -1 for padding."""

    seen: Int[Tensor, "B L"]
    """Of the tokens that are seen: of those that were read before, the last; then all new ones."""
    own: Int[Tensor, "B T"]
    """Of the new tokens, padding among them as if it were none."""

    @classmethod
    def of(
        cls,
        starts: Bool[Tensor, "B T"],
        real: Bool[Tensor, "B T"] | None,
        before: Int[Tensor, "B _"] | None = None,
    ) -> Numbers:
        """Count documents.

        Args:
            starts: True where one begins.
            real: False where a token is padding.
            before: numbers of tokens before; by default none.
        """
        own = starts.cumsum(1)
        if before is None or not before.shape[1]:
            return cls(own if real is None else own.masked_fill(~real, -1), own)
        own = own + before.amax(1, keepdim=True).clamp(min=0)
        return cls(torch.cat((before, own if real is None else own.masked_fill(~real, -1)), 1), own)


def can_be_read(positions: Int[Tensor, "..."] | None) -> bool:
    """Whether it takes nothing to look at them, not even waiting for a GPU."""
    if positions is None or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return positions.device.type == "cpu" and positions.numel() > 0


def check_consecutive(
    position_ids: Int[Tensor, "_ T"] | None,
    marks: TokenMarks,
    before: int | Int[Tensor, "B 1"],
    cache: FastWeightsCache | None,
) -> None:
    """Refuse positions that leave some out, where a token's tells that of the one which leaves the window beside it.

    Looked at on a CPU alone; a GPU would have to be waited for.

    Args:
        position_ids: of the new tokens.
        marks: padding and borders of documents among these.
        before: tokens of its document that each row has read.
        cache: that knows so many, and not their positions, which have begun at 0 for that.

    Raises:
        FastWeightsError: a position is not the one after the last of its document.
    """
    if position_ids is None or not can_be_read(position_ids):
        return
    index = token_index(position_ids.shape[1], before, marks, position_ids.device)
    positions, index = torch.broadcast_tensors(position_ids, index)
    # Rows that differ count their tokens without padding, and positions after a memory are counted with it.
    if cache is not None and (before > 0 if isinstance(before, int) else not cache.position_offset):
        expected = index
    else:
        last = pad(_of_last_real(positions, index >= 0)[:, :-1], (1, 0), value=-1)
        expected = torch.where((last < 0) | (index == 0), positions, last + 1)
    wrong = (index >= 0) & (positions != expected)
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise FastWeightsError(
            f"position_ids have {int(positions[row, place])} where the next in its document is "
            f"{int(expected[row, place])}, and this model's fast weights take the rotary embedding off what leaves the "
            "window, by the position of the token beside it: leave position_ids out, or let each be the one after the "
            "last, and the first 0"
        )


def documents_mask(numbers: Numbers, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """What softmax attention adds to q·k, (B, 1, T, L): 0 where a token sees another of its document, else -max.

    Args:
        numbers: of the documents.
        dtype: of the mask.
        window: how many tokens each sees, itself among them; None for all before it.
    """
    T, L = numbers.own.shape[1], numbers.seen.shape[1]
    near = torch.ones(T, L, dtype=torch.bool, device=numbers.own.device).tril(L - T)
    near = near if window is None else near.triu(L - T + 1 - window)
    seen = near & (numbers.own[:, :, None] == numbers.seen[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def documents_masks(config: PreTrainedConfig, numbers: Numbers, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What a base model takes as its mask; for each type of layer one, if some of its layers alone have windows.

    Args:
        config: of the base model.
        numbers: of the documents. Layers with windows of their own alone see tokens that were read before.
        dtype: of the mask.
    """
    windows = local_windows(config)
    new = Numbers(numbers.seen[:, -numbers.own.shape[1] :], numbers.own)
    masks = {w: documents_mask(new if w is None else numbers, dtype, w) for w in set(windows)}
    if len(masks) == 1:
        return masks[windows[0]]
    return {kind: masks[window] for kind, window in zip(config.layer_types, windows, strict=True)}


def next_real_tokens(
    input_ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], starts: Bool[Tensor, "B T"] | None, no_label: int
) -> Int[Tensor, "B T"]:
    """The token that follows each real position in its document, padding left out; `no_label` where none does."""
    T = input_ids.shape[1]
    places = torch.where(real, torch.arange(T, device=real.device), T)
    following = pad(places[:, 1:], (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    tokens = input_ids.gather(1, following.clamp(max=T - 1))
    missing = ~real | (following == T)
    if starts is not None:
        missing = missing | starts.gather(1, following.clamp(max=T - 1))
    return tokens.masked_fill(missing, no_label)
