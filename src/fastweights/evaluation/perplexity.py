"""How well a model predicts text it has not seen: loss, perplexity, bits per byte.

Three contexts, over the same tokens, all but the first of each document:
`block` cuts the text into independent blocks, so that the first tokens of each have little to go by; `sliding` moves a
window by `stride` tokens and counts only the tokens that are new in it; `stream` reads each document from its beginning
and carries the model's state through it, at constant memory.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from fastweights.errors import DivergedError, FastWeightsError
from fastweights.evaluation.gains import places
from fastweights.layers.distributions import token_losses
from fastweights.reading.stream import Stream, check_block_size
from fastweights.settings.evaluation import EvaluationConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText
    from fastweights.evaluation.dynamic_evaluation import DynamicEvaluation


_LOGITS = 2**28
"""That a batch may have: 1 GB of fp32."""
POSITIONS = (128, 1024, 4096, 16384)
"""Where ranges of positions end."""


@dataclass(frozen=True)
class Evaluation:
    """What a text cost a model."""

    loss: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Loss in bits, spread over the UTF-8 bytes of the text."""
    word_perplexity: float
    """e to the loss spread over the words between white space."""
    tokens: int
    """Tokens that were predicted."""


@dataclass(frozen=True)
class RangeLoss:
    """What the tokens cost that stand in one range of positions in their documents."""

    start: int
    """How many tokens of the document come before the range."""
    stop: int | None
    """How many come before its end; None for the last range, which has none."""
    tokens: int
    """Tokens that were predicted there."""
    loss: float
    """Their mean loss, in nats."""


def evaluate(
    model: PreTrainedModel,
    text: TokenizedText,
    *,
    block_size: int = 1024,
    config: EvaluationConfig | None = None,
    dynamic_evaluation: DynamicEvaluation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """How well a model predicts a text: each token but the first of each document, once.

    Args:
        model: any causal LM; its mode and its weights are afterwards what they were.
        text: what it reads, from `tokenize`.
        block_size: tokens that it reads at once; the last block may be shorter.
        config: context, batch size and how much of the text; by default all of it in independent blocks.
        dynamic_evaluation: of the model, entered already: its weights go on learning from what was scored.
        progress: called as it goes with the tokens that are done, and with all that there are.

    Returns:
        Loss in nats per token, and the measures that follow from it.

    Raises:
        FastWeightsError: `block_size` is beyond the model's absolute positions, the text is too short to predict a
            token of it, or the loss is not a number.
    """
    loss, count = 0.0, 0
    for _, losses in score(
        model,
        text,
        block_size=block_size,
        config=config,
        dynamic_evaluation=dynamic_evaluation,
        progress=progress,
    ):
        loss += losses.cpu().double().sum().item()
        count += len(losses)
    return summary(loss, count, text, config)


def summary(loss: float, count: int, text: TokenizedText, config: EvaluationConfig | None = None) -> Evaluation:
    """All measures of a loss in nats, summed over the `count` tokens that were predicted of what `config` reads."""
    if count == 0:
        raise FastWeightsError("no document has a second token to predict: give longer text")
    mean, n_tokens = loss / count, len(text.tokens[: config.max_tokens if config else None])
    n_bytes, n_words = text.bytes_and_words(n_tokens)
    return Evaluation(
        loss=mean,
        perplexity=_exp(mean),
        bits_per_byte=mean / math.log(2) * n_tokens / max(1, n_bytes),
        word_perplexity=_exp(mean * n_tokens / max(1, n_words)),
        tokens=count,
    )


def by_position(losses: Float[Tensor, " N"], text: TokenizedText) -> list[RangeLoss]:
    """Mean loss by position in the document, in ranges that end at `POSITIONS`; a range without tokens is left out.

    Args:
        losses: of the text's first N tokens, NaN where a token was not predicted.
        text: whose documents they are.
    """
    positions, ranges = places(text, len(losses)), []
    for start, stop in zip((0, *POSITIONS), (*POSITIONS, None), strict=True):
        inside = (positions >= start) & ~losses.isnan()
        if stop is not None:
            inside &= positions < stop
        if n := int(inside.sum()):
            ranges.append(RangeLoss(start, stop, n, losses[inside].double().mean().item()))
    return ranges


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def plain(data: Any) -> Any:
    """The same with None for what JSON has no number for, in dicts and lists of any depth."""
    if isinstance(data, dict):
        return {name: plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def score(
    model: PreTrainedModel,
    text: TokenizedText,
    *,
    block_size: int = 1024,
    config: EvaluationConfig | None = None,
    dynamic_evaluation: DynamicEvaluation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, " n"]]]:
    """(positions, losses in nats) of the text's tokens, a piece at a time; each token but a document's first, once.

    Args:
        model: any causal LM.
        text: what it reads.
        block_size: tokens that it reads at once.
        config: as for `evaluate`.
        dynamic_evaluation: of the model, entered already; its weights go on from one block to the next, and start anew
            where a stream does.
        progress: as for `evaluate`.
    """
    tokens = text.tokens[: config.max_tokens if config else None]
    for positions, losses, counted in (
        _losses(model, text, block_size, config)
        if dynamic_evaluation is None
        else _dynamic_losses(model, text, block_size, config, dynamic_evaluation)
    ):
        if progress is not None:
            progress(int(positions[-1]) + 1, len(tokens))
        yield positions[counted], losses[counted]


@torch.no_grad()
def predictions(
    model: PreTrainedModel, text: TokenizedText, *, block_size: int = 1024, config: EvaluationConfig | None = None
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n V"], Bool[Tensor, " n"]]]:
    """(positions, logits, counted) of the text's tokens, a piece at a time: what was expected where each stands.

    `counted` is False of a document's first token, which nothing before it tells. Arguments are those of `score`.
    """
    config, tokens, begins = _checked(model, text, block_size, config)
    with _evaluating(model):
        pieces = _streams if config.context == "stream" else _windows
        for positions, logits in pieces(model, tokens, begins, block_size, config):
            yield positions, logits, ~begins[positions]


def _losses(
    model: PreTrainedModel, text: TokenizedText, block_size: int, config: EvaluationConfig | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    tokens = text.tokens.to(model.device)
    for positions, logits, counted in predictions(model, text, block_size=block_size, config=config):
        losses = token_losses(logits, tokens[positions])
        if losses.isnan().any():
            raise DivergedError(
                "the loss is nan: weights of the model are not finite, or its dtype has no room for what it computes; "
                "give another model"
            )
        yield positions, losses, counted


def _dynamic_losses(
    model: PreTrainedModel,
    text: TokenizedText,
    block_size: int,
    config: EvaluationConfig | None,
    dynamic_evaluation: DynamicEvaluation,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    config, tokens, begins = _checked(model, text, block_size, config)
    if config.context == "sliding":
        raise FastWeightsError('dynamic evaluation reads each token once: context "block" or "stream", not "sliding"')
    with _evaluating(model):
        if config.context == "block":
            texts = ([(start, stop)] for start, stop, _ in _spans(len(tokens), block_size, config))
        else:
            texts = _documents(len(tokens), begins, block_size, config)
        for pieces in texts:
            stream = Stream(model, block_size)
            if config.context == "stream":
                dynamic_evaluation.reset()
            for start, stop in pieces:
                positions = torch.arange(start + 1, stop + 1, device=tokens.device)
                losses = dynamic_evaluation.score(stream, tokens[None, start:stop], tokens[None, positions])
                yield positions, losses, ~begins[positions]


def check_long_enough(text: TokenizedText, config: EvaluationConfig) -> None:
    """Refuse a text in which nothing can be predicted."""
    if (n_tokens := len(text.tokens[: config.max_tokens])) < 2:
        raise FastWeightsError(f"the text has {n_tokens} tokens; at least 2 are needed to predict one")


def _checked(
    model: PreTrainedModel, text: TokenizedText, block_size: int, config: EvaluationConfig | None
) -> tuple[EvaluationConfig, Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """How to read, the tokens, and which of them begin a document."""
    config = config or EvaluationConfig()
    if block_size < 2:
        raise FastWeightsError(f"block_size is {block_size}; it must be at least 2")
    check_block_size(model, block_size)
    check_stride(config, block_size)
    check_long_enough(text, config)
    tokens = text.tokens[: config.max_tokens].to(model.device)
    return config, tokens, _document_starts(text, len(tokens)).to(tokens.device)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_stride(config: EvaluationConfig, block_size: int) -> None:
    """Refuse a window that would leave tokens out."""
    if config.stride is not None and config.stride >= block_size:
        raise FastWeightsError(f"stride is {config.stride}; it must be smaller than block_size ({block_size})")


def _document_starts(text: TokenizedText, length: int) -> Bool[Tensor, " N"]:
    begins = torch.zeros(length, dtype=torch.bool)
    starts = torch.tensor([0, *text.document_lengths[:-1]]).cumsum(0)
    begins[starts[starts < length]] = True
    return begins


def _spans(length: int, size: int, config: EvaluationConfig) -> Iterator[tuple[int, int, int]]:
    """(start, stop, new): a window reads tokens start ... stop - 1, and the last `new` of their successors count."""
    step = size if config.context == "block" else config.stride or max(1, size // 2)
    counted = 0
    for stop in [*range(min(size, length - 1), length - 1, step), length - 1]:
        start = max(0, stop - size) if config.context == "sliding" else counted
        if stop > counted:
            yield start, stop, stop - counted
        counted = stop


def _windows(
    model: PreTrainedModel, tokens: Int[Tensor, " N"], begins: Bool[Tensor, " N"], size: int, config: EvaluationConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks or windows, as many at once as a batch has, whatever begins within them."""
    spans = list(_spans(len(tokens), size, config))
    most = max(1, min(config.batch_size, _LOGITS // (size * model.config.get_text_config().vocab_size)))
    for (length, new), alike in groupby(spans, key=lambda span: (span[1] - span[0], span[2])):
        starts = [start for start, *_ in alike]
        for i in range(0, len(starts), most):
            batch = torch.tensor(starts[i : i + most], device=tokens.device)[:, None]
            places = batch + torch.arange(length, device=tokens.device)
            logits = model(input_ids=tokens[places], use_cache=False).logits[:, -new:]
            yield (places[:, -new:] + 1).flatten(), logits.flatten(0, 1)


def _streams(
    model: PreTrainedModel, tokens: Int[Tensor, " N"], begins: Bool[Tensor, " N"], size: int, config: EvaluationConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each document from its beginning, or all of the text from its own."""
    for pieces in _documents(len(tokens), begins, size, config):
        stream = Stream(model, size)
        for start, stop in pieces:
            yield torch.arange(start + 1, stop + 1, device=tokens.device), stream.read(tokens[None, start:stop])[0]


def _documents(
    length: int, begins: Bool[Tensor, " N"], size: int, config: EvaluationConfig
) -> Iterator[list[tuple[int, int]]]:
    """Of each, (start, stop) of its pieces: tokens start ... stop - 1 are read at once."""
    starts = [0] if config.carry_documents else begins.nonzero().flatten().tolist()
    for first, end in zip(starts, [*starts[1:], length], strict=True):
        yield [(start, min(start + size, end - 1)) for start in range(first, end - 1, size)]
