"""What one more token costs, in time and in bytes of state, after a context of a given length."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from fastweights.models.architectures import local_windows, position_limit
from fastweights.models.cache import FastWeightsCache, state_bytes
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.reading.stream import Stream, reads_without_end

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import Cache, PreTrainedModel

_PREFILL = 1024
_STEPS_A_TURN = 3
_ENOUGH = 3.0
"""Seconds after which a model is timed no longer at a context."""
_SHARE_OF_MEMORY = 0.8


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
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    tokens: int = 18,
    read_at_most: int | None = None,
    softmax_up_to: int | None = None,
) -> dict[str, list[DecodeCost]]:
    """Time about `tokens` single-token steps of each model at each of the growing `contexts`, side by side.

    Once they have taken three seconds, there are enough of them.

    All take turns, so that what else the machine does falls on all alike. A model with fast weights really reads random
    tokens up to there. A softmax model gets random keys and values of that length, and positions held at its last
    one: beyond its trained length only its time means anything.

    Args:
        models: by name.
        contexts: tokens before those that are timed, in rising order.
        tokens: steps timed at each context, about.
        read_at_most: where more than so many tokens, or as many as fill the longest window, are missing to a context,
            really read these alone, and once, and be told that the others were read: the state has the same size, and
            a big model does not read for an hour.
        softmax_up_to: the longest context at which softmax models are timed; by default all.
    """
    caches: dict[tuple[str, int], Cache] = {}
    for name, model in models.items():
        model.eval()
        timed = contexts
        if softmax_up_to is not None and not _is_recurrent(model):
            timed = [context for context in contexts if context <= softmax_up_to]
        caches |= {(name, context): cache for context, cache in caches_after(model, timed, read_at_most).items()}
    sizes = {turn: state_bytes(cache) for turn, cache in caches.items()}
    times = {turn: [] for turn in caches}
    for _ in range(-(-tokens // _STEPS_A_TURN)):
        for turn, cache in caches.items():
            for step in range(_STEPS_A_TURN + 1):
                if sum(times[turn]) > _ENOUGH:
                    break
                taken = time_of_step(models[turn[0]], cache)
                if step:  # the first one finds another model's weights in the processor's cache
                    times[turn].append(taken)
    costs = {name: [] for name in models}
    for name, context in caches:
        costs[name].append(DecodeCost(context, 1000 * median(times[name, context]), sizes[name, context]))
    return costs


def longest_that_fits(model: PreTrainedModel, contexts: Sequence[int]) -> int:
    """The longest context up to which a softmax model can be timed at all of them in the memory that is free now.

    Args:
        model: with softmax attention, on the CPU.
        contexts: in rising order.

    Returns:
        One of the contexts, or 0.
    """
    a_token, room = state_bytes(_random_cache(model, 1)), _SHARE_OF_MEMORY * psutil.virtual_memory().available
    return max(
        (n for n, all_so_far in zip(contexts, accumulate(contexts), strict=True) if a_token * all_so_far <= room),
        default=0,
    )


def caches_after(
    model: PreTrainedModel, contexts: Sequence[int], at_most: int | None, rows: int = 1
) -> dict[int, Cache]:
    """The state of a model after each of the contexts, of a softmax model with random keys and values.

    Args:
        model: any causal LM.
        contexts: in rising order.
        at_most: as `read_at_most` of `decode_costs`.
        rows: texts in the batch.
    """
    if not _is_recurrent(model):
        return {context: _random_cache(model, context, rows) for context in contexts}
    cache, read, caches = Stream(model, max(contexts)).cache, 0, {}
    if at_most is not None and isinstance(model, FastWeightsForCausalLM):
        own = (window for window in local_windows(model.config.base) if window is not None)
        at_most = max(at_most, max(model.config.windows) + model.config.sinks, *own)
    full = False  # whether the longest window is, so that the state is of the size that it keeps
    for context in contexts:
        if at_most is not None and reads_without_end(model) and context - read > at_most:
            assert isinstance(cache, FastWeightsCache)
            read = context if full else context - at_most
            cache.set_lengths([read] * len(cache.counting))
            full = True
        while read < context:
            step = min(_PREFILL, context - read)
            tokens = torch.randint(model.config.vocab_size, (rows, step), device=model.device)
            model(input_ids=tokens, cache=cache, logits_to_keep=1)
            read += step
        caches[context] = deepcopy(cache)
    return caches


def _is_recurrent(model: PreTrainedModel) -> bool:
    return isinstance(model, FastWeightsForCausalLM) and bool(model.fast_attentions())


def time_of_step(model: PreTrainedModel, cache: Cache, rows: int = 1) -> float:
    """Seconds that a model takes for one random token more of each text of a batch."""
    token = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
    arguments = {}
    limit = position_limit(model.config)  # of a softmax model; ours say what is wrong with a text that is too long
    if limit is not None:
        arguments["position_ids"] = torch.full_like(token, min(cache.get_seq_length(), limit - 1))
    _synchronize(model)
    start = time.perf_counter()
    model(input_ids=token, cache=cache, use_cache=True, **arguments)
    _synchronize(model)
    return time.perf_counter() - start


def _random_cache(model: PreTrainedModel, context: int, rows: int = 1) -> Cache:
    config = model.config
    ours = isinstance(model, FastWeightsForCausalLM)
    cache = FastWeightsCache(model.config) if ours else DynamicCache(config=config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        # One token's, repeated: gigabytes of random numbers take longer than what is timed.
        k, v = torch.randn(2, rows, heads, 1, width, dtype=model.dtype, device=model.device).expand(
            -1, -1, -1, context, -1
        )
        cache.update(k, v, layer)
        kept: Any = cache.layers[layer]
        if type(kept) is DynamicSlidingWindowLayer:  # it keeps a view of all, until the next token comes
            kept.keys, kept.values = (x.clone() for x in (kept.keys, kept.values))  # type: ignore[union-attr]
    return cache


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
