"""Reading a text without end, piece by piece: what a model can carry from one piece to the next, it carries.

Fast weights in the place of attention, and those of a Fast Weight Layer, go on for ever at constant memory, and so does
attention that sees the last tokens alone. Softmax over all tokens, and absolute positions, end somewhere: these start
anew every `context` tokens, as when blocks are read one by one, while a Fast Weight Layer above them goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models.architectures import position_limit
from fastweights.models.cache import FastWeightsCache, detach
from fastweights.models.modeling import FastWeightsForCausalLM

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

PIECE = 1024
"""Tokens that are read at once of a text that has more."""


class Stream:
    """Where a model is in a text.

    Args:
        model: any causal LM.
        context: tokens after which softmax attention and absolute positions start anew.
        cache: state to go on from; by default none.

    Raises:
        FastWeightsError: `context` is beyond the model's absolute positions.
    """

    def __init__(self, model: PreTrainedModel, context: int, cache: Cache | None = None) -> None:
        check_block_size(model, context)
        self.model = model
        self.context = context
        self.cache = self._fresh(None) if cache is None else cache

    def read(self, input_ids: Int[Tensor, "B n"], **kwargs) -> Float[Tensor, "B kept V"]:
        """Logits of the token after each of the next ones, at most `context` of them at once.

        Args:
            input_ids: the next tokens of each row.
            kwargs: for the model, such as `logits_to_keep`.

        Raises:
            FastWeightsError: there are more tokens than `context`.
        """
        if input_ids.shape[1] > self.context:
            raise FastWeightsError(f"a piece has {input_ids.shape[1]} tokens; allowed are up to {self.context}")
        return self.model(
            input_ids=input_ids, cache=self.cache_for(input_ids.shape[1]), use_cache=True, **kwargs
        ).logits

    def cache_for(self, length: int) -> Cache:
        """The state from which the next `length` tokens are to be read."""
        if not reads_without_end(self.model) and self.cache.get_seq_length() + length > self.context:
            self.cache = self._fresh(self.cache)
        return self.cache

    def detach(self) -> None:
        """Let later gradients reach back to here and no further."""
        detach(self.cache)

    def _fresh(self, old: Cache | None) -> Cache:
        if not isinstance(self.model, FastWeightsForCausalLM):
            return DynamicCache(config=self.model.config)
        cache = FastWeightsCache(self.model.config)
        if isinstance(old, FastWeightsCache) and old.block is not None:
            cache.block = old.block
        return cache


def reads_without_end(model: PreTrainedModel) -> bool:
    """Whether all that a model knows of the text before is a state of constant size."""
    return isinstance(model, FastWeightsForCausalLM) and model.max_positions is None and not model.config.growing_layers


def last_position(model: PreTrainedModel) -> int | None:
    """Where a model's absolute positions end; None for a model, of ours or not, that has none."""
    return model.max_positions if isinstance(model, FastWeightsForCausalLM) else position_limit(model.config)


def check_block_size(model: PreTrainedModel, block_size: int) -> None:
    """Refuse blocks that reach beyond a model's absolute positions."""
    limit = last_position(model)
    if limit is not None and block_size > limit:
        raise FastWeightsError(
            f"block_size is {block_size}; this model's absolute positions end at {limit}: give a block_size up to that"
        )


def check_logits(logits: Float[Tensor, "*shape V"]) -> None:
    """Refuse logits that predict nothing: some are NaN or infinite, or none is possible."""
    if not logits.amax(-1).isfinite().all():
        raise FastWeightsError(
            "the model's logits are not finite: its weights are damaged, or its dtype is too small for them; give a "
            "model that predicts"
        )
