"""How texts are sampled from a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastweights.errors import FastWeightsError, check_name, check_seed

PRECISIONS = ("fp32", "bf16")
ADDED = {"conversations": False}
"""Settings that came later, with what was so before: files from then do not know of them, and go on."""
_COLDEST = 0.01


@dataclass(frozen=True)
class SamplingConfig:
    """How many texts are sampled from a model, and how each token is drawn."""

    tokens: int = 1_000_000
    """Tokens in all; the batch with which there are so many is kept whole."""
    length: int | None = None
    """Tokens of a document at most, its end token included; by default the model's context, at most 1,024."""
    batch_size: int = 64
    """Documents that are sampled at once."""
    temperature: float = 1.0
    """1 samples from the model as it is, which distillation wants; lower values from what is likelier."""
    top_k: int | None = None
    """Sample from the likeliest tokens alone, so many; by default from all."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability; by default from all."""
    conversations: bool = False
    """Sample conversations, each up to `length`, from a model with a chat template: it writes what is said to it, too
    (Magpie; Xu et al. 2024, arXiv 2406.08464)."""
    seed: int = 0
    """Seed of sampling, from which each document has random numbers of its own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the model: bf16 takes half the memory; on CPUs it is faster with some models and slower with others."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastWeightsError(f"{name} is {value}; it must be at least 1")
        if not _COLDEST <= self.temperature < float("inf"):
            raise FastWeightsError(f"temperature is {self.temperature}; it must be finite, and at least {_COLDEST}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise FastWeightsError(f"top_p is {self.top_p}; allowed are above 0 and up to 1")
        check_seed(self.seed)
        check_name("precision", self.precision, PRECISIONS)
