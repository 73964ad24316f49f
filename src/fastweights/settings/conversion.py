"""ConversionConfig: how attention becomes fast weights. The one place where these settings are declared.

The command line takes it, a model's config keeps it, and layers are made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastweights.errors import FastWeightsError, check_name

LAYER_TYPES = ("linear_attention", "hybrid_sliding", "full_attention")
POSITIONS = ("keep", "drop")
WRITES = ("all", "leaving")
_OF_THE_PAPER = ("decay", "identity")
_OF_GATES = ("value_gate", "gate_bias", "gate_rank")
_SINKS = 4


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How a model's attention becomes fast weights.

    Raises:
        FastWeightsError: if a value is not among those that are allowed.
    """

    rule: str = "decay"
    """Update rule of the fast weights; decay is the paper's, others are in docs/methods.md."""
    feature_map: str = "identity"
    """Feature map of queries and keys; identity is the paper's, others are in docs/methods.md."""
    window: int = 0
    """Tokens that an exact softmax sees beside the fast weights, 0 for none; the state stays constant either way."""
    sinks: int | None = None
    """First tokens of a text that stay visible to this softmax, as models rest on them; by default 4 with a window."""
    write: Literal["all", "leaving"] | None = None
    """Tokens that fast weights beside a window hold: all, or by default those alone that leave the window."""
    layer_types: list[str] | None = None
    """Per layer linear_attention, hybrid_sliding or full_attention; by default all that see all text are converted."""
    value_gate: bool = True
    """Decay per value channel too, as in the paper."""
    rotary: bool = True
    """Give the fast weights queries and keys with rotary embedding, where the base model has one; the window's have."""
    gate_bias: tuple[float, float] = (2.0, 6.0)
    """First and last gate bias of a head at the start: time constants spread between e^first and e^last tokens."""
    gate_rank: int = 0
    """Rank of the gates' matrices, low in a conversion that is to be small; 0 for full ones, as in the paper."""
    positions: Literal["keep", "drop"] = "keep"
    """Absolute positions of GPT-2: keep them (text ends at the trained length) or drop them (text of any length)."""

    def __post_init__(self) -> None:
        if (self.rule, self.feature_map) != _OF_THE_PAPER:
            self._check_rule_and_feature_map()
        check_name("positions", self.positions, POSITIONS)
        if self.write is not None:
            check_name("write", self.write, WRITES)
        if len(self.gate_bias) != 2 or not all(math.isfinite(bias) for bias in self.gate_bias):
            raise FastWeightsError(f"gate_bias is {self.gate_bias}; it must be two finite numbers")
        object.__setattr__(self, "gate_bias", tuple(self.gate_bias))  # JSON has lists
        if self.gate_rank < 0:
            raise FastWeightsError(f"gate_rank is {self.gate_rank}; allowed are 0 (full) and ranks of 1 up")
        if self.window < 0 or self.window == 1:
            raise FastWeightsError(f"window is {self.window}; allowed are 0 (none) and 2 or more tokens")
        if self.layer_types is not None:
            self._check_layer_types(self.layer_types)
        if self.sinks is not None and self.sinks < 0:
            raise FastWeightsError(f"sinks is {self.sinks}; allowed are 0 (none) and more tokens")
        if self.write == "leaving" and not self.window:
            raise FastWeightsError("write is leaving and window is 0: there is no window to leave; give one, or all")
        if self.sinks and not self.window:
            raise FastWeightsError(f"sinks is {self.sinks} and window is 0: sinks stand beside a window of 2 tokens up")

    def _check_rule_and_feature_map(self) -> None:
        from fastweights.layers.feature_maps import FEATURE_MAPS
        from fastweights.layers.rules import RULES

        check_name("rule", self.rule, RULES)
        check_name("feature_map", self.feature_map, FEATURE_MAPS)
        unused = [name for name in _OF_GATES if getattr(self, name) != getattr(ConversionConfig, name)]
        if unused and not RULES[self.rule].gated:
            raise FastWeightsError(f"rule {self.rule} has no gates: leave {', '.join(unused)} out")

    def _check_layer_types(self, layer_types: list[str]) -> None:
        if unknown := sorted(set(layer_types) - set(LAYER_TYPES)):
            raise FastWeightsError(f"layer_types has {', '.join(unknown)}; known are {', '.join(LAYER_TYPES)}")
        if "hybrid_sliding" in layer_types and not self.window:
            raise FastWeightsError(f"layer_types has hybrid_sliding and window is {self.window}; give a window of 2 up")
        if self.window and "hybrid_sliding" not in layer_types:
            raise FastWeightsError(f"window is {self.window} and layer_types has no hybrid_sliding: none would have it")

    def for_layers(self, layers: int) -> ConversionConfig:
        """The same with a type for each of so many layers, and a number of sinks.

        Raises:
            FastWeightsError: if `layer_types` has another number of entries.
        """
        layer_types = self.layer_types
        if layer_types is None:
            layer_types = ["hybrid_sliding" if self.window else "linear_attention"] * layers
        if len(layer_types) != layers:
            raise FastWeightsError(f"layer_types has {len(layer_types)} entries; the base model has {layers} layers")
        sinks = (_SINKS if self.window else 0) if self.sinks is None else self.sinks
        write = self.write or ("leaving" if self.window else "all")
        return replace(self, layer_types=list(layer_types), sinks=sinks, write=write)
