"""How far a model's next tokens are from those of the model that it was made of.

A text's loss can be as low for other reasons than that a model stayed itself, and lower than the original's; what each
of the two expects at every token cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastweights.errors import DivergedError, FastWeightsError
from fastweights.evaluation.perplexity import by_position, predictions
from fastweights.layers.distributions import token_divergences

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText
    from fastweights.settings.evaluation import EvaluationConfig


@dataclass(frozen=True)
class RangeDivergence:
    """Of the tokens that stand in one range of positions in their documents."""

    start: int
    """How many tokens of the document come before the range."""
    stop: int | None
    """How many come before its end; None for the last range, which has none."""
    tokens: int
    """Tokens that were predicted there."""
    divergence: float
    """Their mean divergence, in nats."""


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its original, over the tokens of a text."""

    divergence: float
    """Mean KL(original || model) of the next token, in nats."""
    median: float
    """Of it, over tokens."""
    same_likeliest: float
    """Share of tokens at which both find the same next token the likeliest."""
    tokens: int
    """Tokens that were predicted."""
    by_position: list[RangeDivergence]
    """The same mean by position in the document."""


def check_vocabularies(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Refuse two models that choose between different tokens, as far as their number tells."""
    ours, theirs = (each.config.get_text_config().vocab_size for each in (model, original))
    if ours != theirs:
        raise FastWeightsError(
            f"the model chooses between {ours} tokens and its original between {theirs}: give the model that it was "
            "made of"
        )


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    original: PreTrainedModel,
    text: TokenizedText,
    *,
    block_size: int = 1024,
    config: EvaluationConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """How far what a model expects next is from what its original expects, at each token but a document's first.

    Args:
        model: any causal LM; its mode is afterwards what it was.
        original: that it was made of, by conversion or by rounding, on the same device.
        text: what both read.
        block_size: tokens that they read at once; in a stream, after which softmax over all tokens starts anew.
        config: context, batch size and how much of the text, as for `evaluate`.
        progress: called as it goes with the tokens that are done, and with all that there are.

    Returns:
        Its mean, its median and its mean by position, in nats, and how often both find the same token the likeliest.

    Raises:
        FastWeightsError: the two have vocabularies of different sizes, or as `evaluate` does.
    """
    check_vocabularies(model, original)
    of_text = torch.full((len(text.tokens[: config.max_tokens if config else None]),), float("nan"))
    same = torch.zeros(len(of_text), dtype=torch.bool)
    both = (predictions(each, text, block_size=block_size, config=config) for each in (model, original))
    for (places, logits, counted), (_, expected, _) in zip(*both, strict=True):
        found = token_divergences(logits, expected)
        if not found.isfinite().all():
            raise DivergedError(
                "the divergence is not finite: weights of a model are not, or its dtype has no room for what it "
                "computes; give another model"
            )
        at = places[counted].cpu()
        of_text[at] = found[counted].float().cpu()
        same[at] = (logits.argmax(-1) == expected.argmax(-1))[counted].cpu()
        if progress is not None:
            progress(int(places[-1]) + 1, len(of_text))
    known = ~of_text.isnan()
    if not known.any():
        raise FastWeightsError("no document has a second token to predict: give longer text")
    ranges = [RangeDivergence(x.start, x.stop, x.tokens, x.loss) for x in by_position(of_text, text)]
    return Divergence(
        divergence=of_text[known].double().mean().item(),
        median=of_text[known].median().item(),
        same_likeliest=same[known].double().mean().item(),
        tokens=int(known.sum()),
        by_position=ranges,
    )
