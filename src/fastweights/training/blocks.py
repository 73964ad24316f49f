"""Blocks of tokens to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from fastweights.errors import FastWeightsError
from fastweights.layers.next_token_gradient import NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from torch import Tensor


class TokenBlocks(Dataset):
    """Consecutive blocks of `block_size` tokens, of which each document stands alone; a rest too short is left out.

    A block is a dict of three, each of `block_size`: `input_ids`; `labels`, the same but -100 for the first token of
    each document, which nothing before it tells; and `position_ids`, which start anew at 0 with each document. A
    document that begins in an earlier block counts from 0 in each.

    Args:
        tokens: documents, one after another.
        block_size: tokens in a block.
        document_lengths: tokens in each document, in order; by default all are one document.

    Raises:
        FastWeightsError: there are fewer tokens than in one block.
    """

    def __init__(
        self, tokens: Int[Tensor, " n_tokens"], block_size: int, document_lengths: Sequence[int] | None = None
    ) -> None:
        if len(tokens) < block_size:
            raise FastWeightsError(
                f"the text has {len(tokens)} tokens, fewer than one block of {block_size}: "
                "give more text or a smaller block_size"
            )
        self.block_size = block_size
        self.blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
        lengths = torch.tensor(document_lengths or [len(tokens)])
        starts = torch.zeros(len(tokens) + 1, dtype=torch.bool)
        starts[torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))] = True
        self.document_starts = starts[: self.blocks.numel()].view_as(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, " block_size"]]:
        block, starts = self.blocks[index], self.document_starts[index]
        places = torch.arange(self.block_size)
        return {
            "input_ids": block,
            "labels": block.masked_fill(starts, NO_LABEL),
            "position_ids": places - torch.where(starts, places, 0).cummax(0).values,
        }

    def vocabulary(self) -> Int[Tensor, " v"]:
        """The tokens that are in these, each once, in order."""
        return self.blocks.unique()

    def begins_with_a_document(self, index: int) -> bool:
        """Whether a document starts at a block's first token; else the block goes on with one."""
        return bool(self.document_starts[index, 0])


def positions_if_packed(position_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """The positions of a batch of blocks where a document starts inside one, else None.

    Models then number the tokens themselves, and softmax attention needs no mask that would slow it down.
    """
    return position_ids if bool((position_ids[:, 1:] == 0).any()) else None
