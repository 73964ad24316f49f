"""Where a way to read gains: by place in the document, by rarity of the token, by how often it has occurred before.

The analysis of K. Clark et al., "Meta-Learning Fast Weight Language Models" (arXiv 2212.02475).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from fastweights.data import TokenizedText
    from fastweights.evaluation.comparison import MethodResult

# Groups with fewer tokens than this say nothing.
_SMALLEST_GROUP = 100


@dataclass(frozen=True)
class Gain:
    """Mean gain over the tokens of one group."""

    group: str
    tokens: int
    bits: float
    """Loss of the static model less that of the method, in bits per token."""


def gains(results: list[MethodResult], text: TokenizedText) -> dict[str, dict[str, list[Gain]]]:
    """Where each method gains over the static model.

    Args:
        results: of one text, the static model's first.
        text: that text.

    Returns:
        For each way to group tokens, for each result's name but the first, the gain in each group, in bits per token.
        What diverged on the way is left out.
    """
    static, *others = results
    others = [result for result in others if math.isfinite(result.evaluation.loss)]
    tokens = text.tokens[: len(static.losses)]
    groupings = {
        "tokens before, in the document": places(text, len(tokens)),
        "occurrences in a million tokens of the text": (
            torch.bincount(tokens)[tokens].double() * 1e6 / len(tokens)
        ).long(),
        "earlier occurrences in the document": earlier_occurrences(text, len(tokens)),
    }
    return {
        grouping: {result.name: _by_power_of_four(values, static.losses - result.losses) for result in others}
        for grouping, values in groupings.items()
    }


def places(text: TokenizedText, length: int) -> Int[Tensor, " N"]:
    """How many tokens of its document come before each token."""
    parts = [torch.arange(n) for n in text.document_lengths]
    return torch.cat(parts)[:length]


def earlier_occurrences(text: TokenizedText, length: int) -> Int[Tensor, " N"]:
    """How often each token has occurred before in its document."""
    counts = torch.zeros(length, dtype=torch.long)
    start = 0
    for n in text.document_lengths:
        document = text.tokens[start : min(start + n, length)]
        order = document.argsort(stable=True)
        ordered = document[order]
        begins = torch.ones(len(ordered), dtype=torch.bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        index = torch.arange(len(ordered))
        first = torch.where(begins, index, 0).cummax(0).values if len(ordered) else index
        counts[start : start + len(document)][order] = index - first
        start += n
        if start >= length:
            break
    return counts


def _by_power_of_four(values: Int[Tensor, " N"], gain: Float[Tensor, " N"]) -> list[Gain]:
    scored = ~gain.isnan()
    values, gain = values[scored], gain[scored].double() / math.log(2)
    # 0; 1 to 3; 4 to 15; 16 to 63; ...
    group = torch.where(values > 0, (values.clamp(min=1).double().log2() / 2 + 1e-9).floor().long() + 1, 0)
    found = []
    for i in range(int(group.max()) + 1 if len(group) else 0):
        inside = group == i
        if (n := int(inside.sum())) >= _SMALLEST_GROUP:
            found.append(Gain(_name(i), n, gain[inside].mean().item()))
    return found


def _name(group: int) -> str:
    if group == 0:
        return "0"
    low, high = 4 ** (group - 1), 4**group - 1
    return f"{_short(low)}–{_short(high)}"


def _short(n: int) -> str:
    return str(n) if n < 1024 else f"{round(n / 1024)}k" if n < 2**20 else f"{round(n / 2**20)}M"
