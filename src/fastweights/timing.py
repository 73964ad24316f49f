"""What one more token costs, in time and in memory, after a context of a given length."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from fastweights.models.cache import state_bytes
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.stream import reads_without_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import Cache, PreTrainedModel

_PREFILL = 1024


@dataclass(frozen=True)
class DecodeCost:
    """Cost of a token at batch size 1."""

    context: int
    """Tokens before it."""
    ms_per_token: float
    """Median time, in milliseconds."""
    state_bytes: int
    """Bytes that the model keeps between two tokens."""


@torch.no_grad()
def decode_costs(
    model: PreTrainedModel,
    contexts: Sequence[int],
    *,
    tokens: int = 16,
    read_at_most: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[DecodeCost]:
    """Time `tokens` single-token steps at each of the growing `contexts`.

    A model with fast weights really reads random tokens up to there. A softmax model gets keys and values of that
    length at random, and positions held at its last one: beyond its trained length only its time means anything.

    Args:
        read_at_most: before each context, really read only so many tokens, and be told that the others were read: the
            state has the same size, and a big model does not read for an hour.
    """
    model.eval()
    vocabulary = model.config.vocab_size
    cache = DynamicCache(config=model.config)
    costs, read = [], 0
    for context in contexts:
        if isinstance(model, FastWeightsForCausalLM):
            if read_at_most is not None and reads_without_end(model) and context - read > read_at_most:
                _pretend(cache, context - read_at_most)
                read = context - read_at_most
            while read < context:
                step = min(_PREFILL, context - read)
                model(
                    input_ids=torch.randint(vocabulary, (1, step), device=model.device),
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                read += step
        else:
            cache = _random_cache(model, context)
        times = [_step(model, cache) for _ in range(tokens)]
        read += tokens
        costs.append(DecodeCost(context, 1000 * median(times), state_bytes(cache)))
        if progress is not None:
            progress(context)
    return costs


def _pretend(cache: Cache, tokens: int) -> None:
    """Move the text's place on without reading."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens  # type: ignore[attr-defined]


def _step(model: PreTrainedModel, cache: Cache) -> float:
    token = torch.randint(model.config.vocab_size, (1, 1), device=model.device)
    arguments = {}
    if not isinstance(model, FastWeightsForCausalLM):
        last = model.config.max_position_embeddings - 1
        arguments["position_ids"] = torch.tensor([[min(cache.get_seq_length(), last)]], device=model.device)
    _synchronize(model)
    start = time.perf_counter()
    model(input_ids=token, past_key_values=cache, use_cache=True, **arguments)
    _synchronize(model)
    return time.perf_counter() - start


def _random_cache(model: PreTrainedModel, context: int) -> Cache:
    config = model.config
    cache = DynamicCache(config=config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        k, v = torch.randn(2, 1, heads, context, width, dtype=model.dtype, device=model.device)
        cache.update(k, v, layer)
    return cache


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
