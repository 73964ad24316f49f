"""Recall: whether what a text said once still tells the model, at a growing distance, what comes next.

    The name of the ship is Tom. (other lines) The name of the ship is

The right value is ranked among ten by the likelihood of the whole continuation, so that models of bytes and of subwords
are measured alike. Each value is the right one equally often in the same surroundings: a model that sees nothing of the
first sentence is right once in ten, whatever it prefers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch

from fastweights.data import first_tokens
from fastweights.errors import FastWeightsError
from fastweights.reading.stream import Stream, last_position
from fastweights.settings.evaluation import RecallConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUES = ("Tom", "Lily", "Max", "Ben", "Sue", "Anna", "Jack", "Mia", "Sam", "Leo")
_KEYS = ("ship", "lamp", "horse", "garden", "river", "door", "boat", "mountain", "tree", "train")
_FILLER = (
    "The grass is green and the sky is blue.",
    "In the morning the people went to the market.",
    "The old man slept in the warm sun.",
    "It rained for most of the day.",
    "The children played near the old house.",
    "Someone was singing in the kitchen.",
    "There was bread and cheese for everyone.",
    "The road went on through the woods.",
    "Smoke rose from the roofs.",
    "After a while they all went home.",
)
# Tokens that are read at once.
_PIECE = 512


@dataclass(frozen=True)
class Recall:
    """What came of one distance."""

    distance: int
    """Tokens from the value to the place where it is asked for."""
    documents: int
    accuracy: float
    """Share of documents in which the right value is the likeliest; 0.1 by chance."""
    rank: float
    """Mean rank of the right value; 1 is the best, 5.5 chance."""
    loss: float
    """Mean of -log of the right value's share of the ten values' likelihood, in nats; log 10 = 2.3 for equal shares."""


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RecallConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Recall]:
    """How well a model recalls a value that it has read, by distance.

    Args:
        model: any causal LM; a softmax model sees all of a document, and one with absolute positions is not asked at
            distances that reach beyond them.
        tokenizer: its own.
        config: distances, number of documents, seed.
        progress: called as it goes with the tokens that are done, and with all that there are.

    Returns:
        One entry for each distance, in the order of `config`.

    Raises:
        FastWeightsError: a distance is shorter than a sentence of this tokenizer.
    """
    config = config or RecallConfig()
    limit, results = last_position(model), []
    asked = {distance: _documents(tokenizer, distance, config) for distance in config.distances}
    asked = {d: documents for d, documents in asked.items() if limit is None or max(map(_length, documents)) <= limit}
    done, total = 0, sum(_length(document) for documents in asked.values() for document in documents)
    was_training = model.training
    model.eval()
    try:
        for distance, documents in asked.items():
            scores = []
            for document in documents:
                scores.append(_score(model, document))
                done += _length(document)
                if progress is not None:
                    progress(done, total)
            results.append(_summary(distance, torch.stack(scores), torch.tensor([d.right for d in documents])))
    finally:
        model.train(was_training)
    return results


def check_distances(tokenizer: PreTrainedTokenizerBase, config: RecallConfig) -> None:
    """Refuse, before anything else is read, a distance shorter than a sentence."""
    _documents(tokenizer, min(config.distances), config)


@dataclass(frozen=True)
class _Document:
    context: list[int]
    """Up to where the value is asked for."""
    answers: list[list[int]]
    """All values, as they would go on."""
    right: int
    """Index of the one that the context says."""


def _length(document: _Document) -> int:
    return len(document.context) + max(map(len, document.answers)) - 1


def _documents(tokenizer: PreTrainedTokenizerBase, distance: int, config: RecallConfig) -> list[_Document]:
    def ids(line: str) -> list[int]:
        return tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    found, draw = [], random.Random(config.seed)
    start, lines = first_tokens(tokenizer), [ids(line) for line in _FILLER]
    for key in islice(cycle(_KEYS), config.repeats):
        said = [ids(f"The name of the {key} is {value}.") for value in VALUES]
        if distance < (longest := max(map(len, said))):
            raise FastWeightsError(
                f"a distance of recall is {distance} and a sentence has {longest} tokens here: give longer ones"
            )
        filler: list[int] = []
        while len(filler) < distance:
            filler += draw.choice(lines)
        shared = next(i for i, tokens in enumerate(zip(*said, strict=False)) if len(set(tokens)) > 1)
        for right, fact in enumerate(said):
            # From a value to its repetition there are as many tokens as in its sentence, and those in between.
            between = filler[len(filler) - (distance - len(fact)) :]
            found.append(_Document(start + fact + between + fact[:shared], [tokens[shared:] for tokens in said], right))
    return found


@torch.no_grad()
def _score(model: PreTrainedModel, document: _Document) -> Float[Tensor, " values"]:
    """Log-likelihood of each answer. The context is read once, and its state then copied for all answers."""
    device = model.device
    lengths = torch.tensor([len(answer) for answer in document.answers], device=device)
    answers = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long, device=device)
    for row, answer in zip(answers, document.answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    stream = Stream(model, _length(document))
    for piece in torch.tensor(document.context, device=device).split(_PIECE):
        logits = stream.read(piece[None], logits_to_keep=1)
    logits = logits.expand(len(answers), -1, -1)
    if answers.shape[1] > 1:
        stream.cache.batch_repeat_interleave(len(answers))
        logits = torch.cat((logits, stream.read(answers[:, :-1])), 1)
    picked = logits.float().log_softmax(-1).gather(2, answers[..., None])[..., 0]
    places = torch.arange(answers.shape[1], device=device)
    return picked.masked_fill(places >= lengths[:, None], 0).sum(1).cpu()


def _summary(distance: int, scores: Float[Tensor, "documents values"], right: Int[Tensor, " documents"]) -> Recall:
    of_right = scores.gather(1, right[:, None])
    better, equal = (scores > of_right).sum(1), (scores == of_right).sum(1) - 1
    ranks = 1 + better + equal / 2
    return Recall(
        distance=distance,
        documents=len(scores),
        accuracy=(ranks == 1).double().mean().item(),
        rank=ranks.double().mean().item(),
        loss=torch.nn.functional.cross_entropy(scores.double(), right).item(),
    )
