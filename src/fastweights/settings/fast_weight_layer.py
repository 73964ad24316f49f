"""What a Fast Weight Layer is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastweights.errors import FastWeightsError, check_name, make_whole

DECAYS = ("none", "scalar", "channel", "input")


@dataclass(frozen=True)
class FastWeightLayerSettings:
    """What a Fast Weight Layer is made of."""

    expansion: int = 4
    """Width of the block over the width of the model."""
    updates: bool = True
    """Take gradient steps while reading; without them the block is an ordinary one, the control of comparisons."""
    decay: Literal["none", "scalar", "channel", "input"] = "input"
    """How the fast weights fade: never (the paper), by one learned number for each of the block's three layers, by
    one for each of their channels, or by one for each layer computed from each token."""
    segment: int = 128
    """Steps after which gradients are taken at the weights as they have become; 0 for always at the trained ones."""
    slow_vocabulary: int = 0
    """Tokens that share the slow pass's softmax with a position's own label: the first so many of the vocabulary, in
    most tokenizers the most frequent; 0 for all. A few thousand make a model with a large vocabulary cheaper."""
    initial_step_size: float = 0.1
    """Step size of W2 before training; those of the other parameter groups start in proportion to it."""
    initial_decay: float = 0.999
    """Share of the fast weights that a step keeps before training."""

    def __post_init__(self) -> None:
        check_name("decay", self.decay, DECAYS)
        make_whole(self, "expansion", "segment", "slow_vocabulary")
        if self.expansion < 1:
            raise FastWeightsError(f"expansion is {self.expansion}; it must be at least 1")
        if self.segment < 0:
            raise FastWeightsError(f"segment is {self.segment}; allowed are 0 (none) and 1 or more steps")
        if self.slow_vocabulary < 0:
            raise FastWeightsError(
                f"slow_vocabulary is {self.slow_vocabulary}; allowed are 0 (all tokens) and 1 or more of them"
            )
        if not 0 < self.initial_step_size < math.inf:
            raise FastWeightsError(f"initial_step_size is {self.initial_step_size}; it must be positive and finite")
        if not 0 < self.initial_decay < 1:
            raise FastWeightsError(f"initial_decay is {self.initial_decay}; it must lie between 0 and 1")
