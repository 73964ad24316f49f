"""How well a model predicts text it has not seen: loss, perplexity, bits per byte.

Two contexts: `block` cuts the text into independent blocks, so that the first tokens of each have little to go by;
`sliding` moves a window by `stride` tokens and counts only the tokens that are new in it, so that each has at least
`block_size - stride` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch.nn.functional import cross_entropy

from fastweights.errors import FastWeightsError
from fastweights.models.architectures import position_limit
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.options import ADVANCED

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText

CONTEXTS = ("block", "sliding")


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate."""

    context: Literal["block", "sliding"] = "block"
    """block: independent blocks; sliding: a window that moves by `stride`, each token counted once."""
    stride: Annotated[int | None, ADVANCED] = None
    """Tokens that a sliding window moves by, fewer than a block; by default half of it."""
    batch_size: Annotated[int, ADVANCED] = 4
    """Windows in a forward pass."""
    max_tokens: Annotated[int | None, ADVANCED] = None
    """Read only the text's first so many tokens."""

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS:
            raise FastWeightsError(f"context {self.context!r} is unknown; known are {', '.join(CONTEXTS)}")
        if self.batch_size < 1:
            raise FastWeightsError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.stride is not None and self.stride < 1:
            raise FastWeightsError(f"stride is {self.stride}; it must be at least 1")


@dataclass(frozen=True)
class Evaluation:
    """What a text cost a model."""

    loss: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Loss in bits, spread over the UTF-8 bytes of the text."""
    tokens: int
    """Tokens that were predicted."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, text: TokenizedText, *, block_size: int = 1024, config: EvaluationConfig | None = None
) -> Evaluation:
    """Loss of `model` on `text`, of which it reads `block_size` tokens at once; the last block may be shorter."""
    config = config or EvaluationConfig()
    if block_size < 2:
        raise FastWeightsError(f"block_size is {block_size}; it must be at least 2")
    check_block_size(model, block_size)
    if config.stride is not None and config.stride >= block_size:
        raise FastWeightsError(f"stride is {config.stride}; it must be smaller than block_size ({block_size})")
    tokens = text.tokens[: config.max_tokens].to(model.device)
    if len(tokens) < 2:
        raise FastWeightsError(f"the text has {len(tokens)} tokens; at least 2 are needed to predict one")
    was_training = model.training
    model.eval()
    try:
        loss, count = 0.0, 0
        for windows, new in _windows(tokens, block_size, config):
            losses = token_losses(model, windows)[:, -new:]
            loss += losses.double().sum().item()
            count += losses.numel()
    finally:
        model.train(was_training)
    mean = loss / count
    tokens_per_byte = len(text.tokens) / max(1, text.n_bytes)
    return Evaluation(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=mean / math.log(2) * tokens_per_byte,
        tokens=count,
    )


def check_block_size(model: PreTrainedModel, block_size: int) -> None:
    """Refuse blocks that reach beyond a model's absolute positions."""
    ours = isinstance(model, FastWeightsForCausalLM)
    limit = model.max_positions if ours else position_limit(model.config)
    if limit is not None and block_size > limit:
        raise FastWeightsError(
            f"block_size is {block_size}; this model's absolute positions end at {limit}: give a block_size up to that"
        )


def token_losses(model: PreTrainedModel, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """Negative log-likelihood of each token but the first, in nats."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(input_ids), -1)


def _windows(
    tokens: Int[Tensor, " N"], size: int, config: EvaluationConfig
) -> Iterator[tuple[Int[Tensor, "B T"], int]]:
    """Batches of equally long windows, and how many of their last tokens are to be counted."""
    step = size if config.context == "block" else config.stride or max(1, size // 2)
    spans, counted = [], 1  # the first token of all is predicted by nothing
    for stop in [*range(min(size, len(tokens)), len(tokens), step), len(tokens)]:
        start = max(0, stop - size) if config.context == "sliding" else counted - 1
        spans.append((stop - start, stop - max(counted, start + 1), start))
        counted = stop if config.context == "sliding" else stop + 1
    for (length, new), alike in groupby(spans, key=lambda span: span[:2]):
        starts = [start for *_, start in alike]
        for i in range(0, len(starts) if new > 0 else 0, config.batch_size):
            batch = starts[i : i + config.batch_size]
            yield torch.stack([tokens[start : start + length] for start in batch]), new
