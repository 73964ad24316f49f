"""How text is read and scored: contexts, dynamic evaluation, and comparisons of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastweights.errors import FastWeightsError, check_name, check_seed

CONTEXTS = ("block", "sliding", "stream")
DYNAMIC_RULES = ("sgd", "rms")
METHODS = ("static", "fwl", "sgd", "rms")


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate."""

    context: Literal["block", "sliding", "stream"] = "block"
    """block: independent blocks; sliding: a window that moves by `stride`; stream: the state is carried through each
    document."""
    stride: int | None = None
    """Tokens that a sliding window moves by, fewer than a block; by default half of it."""
    batch_size: int = 4
    """Windows in a forward pass; a stream is read alone."""
    max_tokens: int | None = None
    """Read only the text's first so many tokens."""
    carry_documents: bool = False
    """A stream goes on across the ends of documents, instead of starting anew with each."""

    def __post_init__(self) -> None:
        check_name("context", self.context, CONTEXTS)
        if self.batch_size < 1:
            raise FastWeightsError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise FastWeightsError(f"max_tokens is {self.max_tokens}; at least 2 are needed to predict one")
        if self.stride is not None and self.stride < 1:
            raise FastWeightsError(f"stride is {self.stride}; it must be at least 1")


@dataclass(frozen=True)
class HeldOutConfig(EvaluationConfig):
    """The same, on a text short enough to be evaluated after each stage of training."""

    max_tokens: int | None = 131072
    """Read only the text's first so many tokens."""
    parts_tokens: int = 16384
    """Of these, the tokens on which the parts of a hybrid model are evaluated after the last stage; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts_tokens < 0 or self.parts_tokens == 1:
            raise FastWeightsError(f"parts_tokens is {self.parts_tokens}; allowed are 0 (none) and 2 or more")


@dataclass(frozen=True)
class DynamicEvaluationConfig:
    """How a model adapts to what it is evaluated on."""

    rule: Literal["sgd", "rms"] = "sgd"
    """sgd: plain gradient steps; rms: each weight's step divided by the size of its gradients on training text."""
    learning_rate: float | None = None
    """Step size; by default 0.003 for sgd and 1e-4 for rms. Tune it on validation text."""
    decay: float = 0.0
    """Share of the way back to the trained weights that each step goes."""
    segment: int = 64
    """Tokens between two steps."""
    parameters: str = ".*"
    """Pattern (of Python's re) that the whole name of a parameter matches if it is to adapt."""
    epsilon: float = 1e-5
    """Added to the root mean square of rms."""

    def __post_init__(self) -> None:
        check_name("rule", self.rule, DYNAMIC_RULES)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise FastWeightsError(f"learning_rate is {self.learning_rate}; it must be positive and finite")
        if not 0 <= self.decay <= 1:
            raise FastWeightsError(f"decay is {self.decay}; allowed are 0 to 1")
        if self.segment < 1:
            raise FastWeightsError(f"segment is {self.segment}; it must be at least 1")
        if not self.epsilon > 0:
            raise FastWeightsError(f"epsilon is {self.epsilon}; it must be positive")

    @property
    def step_size(self) -> float:
        """The learning rate, or its default."""
        return self.learning_rate or {"sgd": 0.003, "rms": 1e-4}[self.rule]


@dataclass(frozen=True)
class RmsConfig(DynamicEvaluationConfig):
    """The same, with rms as the default rule."""

    rule: Literal["sgd", "rms"] = "rms"


@dataclass(frozen=True)
class ComparisonConfig:
    """Which methods in which contexts."""

    methods: tuple[Literal["static", "fwl", "sgd", "rms"], ...] | None = None
    """static: the model without its Fast Weight Layer; fwl: with it; sgd and rms: static with dynamic evaluation. By
    default static, and fwl where the model has such a layer."""
    contexts: tuple[Literal["block", "sliding", "stream"], ...] = ("block",)
    """block: independent blocks; sliding: a window that moves by `stride`; stream: the state is carried through each
    document. Dynamic evaluation goes on from block to block, and starts anew with each document of a stream."""
    sgd: DynamicEvaluationConfig = field(default_factory=DynamicEvaluationConfig)
    rms: RmsConfig = field(default_factory=RmsConfig)
    tune_tokens: int = 0
    """Tokens of validation text on which step size and decay of dynamic evaluation are tuned first; 0 for none."""
    statistics_blocks: int = 32
    """Blocks of training text from which rms takes the sizes of gradients."""

    def __post_init__(self) -> None:
        for name, known in (("methods", METHODS), ("contexts", CONTEXTS)):
            unknown = sorted(set(getattr(self, name) or ()) - set(known))
            if unknown:
                raise FastWeightsError(f"{name} has {', '.join(unknown)}; known are {', '.join(known)}")
        if self.statistics_blocks < 1:
            raise FastWeightsError(f"statistics_blocks is {self.statistics_blocks}; it must be at least 1")
        if not self.contexts or self.methods == ():
            raise FastWeightsError("methods and contexts need at least one entry each")
        for rule in ("sgd", "rms"):
            if (given := getattr(self, rule).rule) != rule:
                raise FastWeightsError(f"{rule}.rule is {given!r}; it must be {rule!r}, as the method of that name")
        if "sliding" in self.contexts and {"sgd", "rms"} & set(self.methods or ()):
            raise FastWeightsError(
                'sgd and rms read each token once: use the contexts "block" and "stream", not "sliding"'
            )


@dataclass(frozen=True)
class RecallConfig:
    """How to test what a model recalls."""

    distances: tuple[int, ...] = (64, 256, 1024, 4096)
    """Tokens from a value to the place where it is asked for."""
    repeats: int = 2
    """Documents for each of the ten values."""
    seed: int = 0
    """Seed of the lines in between."""

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 1:
            raise FastWeightsError(f"distances are {list(self.distances)}; give one or more, each at least 1")
        if self.repeats < 1:
            raise FastWeightsError(f"repeats is {self.repeats}; it must be at least 1")
        check_seed(self.seed)
