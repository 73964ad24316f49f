"""ConversionConfig: how attention becomes fast weights. The one place where these settings are declared.

The command line takes it, a model's config keeps it, and layers are made from it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from fastweights.errors import FastWeightsError, check_name, make_whole, whole_number

if TYPE_CHECKING:
    from collections.abc import Collection

LAYER_TYPES = ("linear_attention", "hybrid_sliding", "full_attention")
POSITIONS = ("keep", "drop")
WRITES = ("all", "leaving")
KeptDtype = Literal["auto", "int8"]
KEPT_DTYPES: tuple[str, ...] = get_args(KeptDtype)
AUTO, EIGHT_BITS = KEPT_DTYPES
_OF_THE_PAPER = ("decay", "identity")
_HALF = (0.0, 0.0)
OF_GATES = ("value_gate", "gate_bias", "gate_rank", "write_bias")
BEFORE = {"sinks": 0, "write": "all", "normaliser": False}
"""What was so in conversions that were saved without a word of it, by earlier versions."""
_DTYPES = {"window_dtype": AUTO, "state_dtype": AUTO, "softmax_dtype": AUTO}
ADDED = {"value_map": False, "conv_size": 0, "feature_dim": None, "mix_gate": False, **_DTYPES}
"""Settings that came later, with what was so before: runs and memories from then do not know of them, and go on."""
_SINKS = 4
_AUTOMATIC = "auto:"
_NONE = "none"
_LAYERS = re.compile(r"none|auto:\d+|\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, kw_only=True)
class SharedConversion:
    """What a conversion is told beside its rule, its feature map and its windows.

    Raises:
        FastWeightsError: if a value is not among those that are allowed.
    """

    normaliser: bool | None = None
    """Divide what is read by the sum of its weights; by default, rules add and gated do with maps that allow it."""
    sinks: int | None = None
    """First tokens of a text that a window's softmax goes on seeing, as models rest on them; by default 4 with one."""
    write: Literal["all", "leaving"] | None = None
    """Tokens that fast weights beside a window hold: all, or by default those alone that leave the window."""
    layer_types: list[str] | None = None
    """Per layer linear_attention, hybrid_sliding or full_attention; by default all that see all text are converted."""
    layers: str | None = None
    """Which to convert: numbers such as 0,4-9, auto:4 for all but the 4 that are missed most, or none; else all."""
    wide_window: int = 0
    """Window of the layers that `layers` leaves out, which are hybrid then, too; 0: they see all tokens."""
    window_dtype: KeptDtype = "auto"
    """Of the keys and values of windows beside fast weights: auto, the model's, or int8, a quarter of the memory of
    float32: MXINT8, eight bits each with a power of two for each 32. What leaves such a window is written so, too."""
    state_dtype: KeptDtype = "auto"
    """Of the fast weights between two calls, as between two tokens of an answer: auto, float32, or int8, a quarter of
    that: MXINT8, rounded up or down by a pattern that goes with the position, so that small changes add up."""
    softmax_dtype: KeptDtype = "auto"
    """Of the keys and values in the caches of layers that keep their softmax attention: auto, the model's, or int8, as
    windows have them."""
    value_gate: bool = True
    """Decay per value channel too, as in the paper."""
    value_map: bool = False
    """Give the fast weights values of their own by a matrix for each head, which starts as the identity."""
    conv_size: int = 0
    """Tokens that a short convolution makes each query, key and value of, 4 in Gated DeltaNet; 0 for none."""
    mix_gate: bool = False
    """Let each head set, token by token, how much its fast weights say, and how much less its window; it starts as if
    it were not there. To a converted model that is trained on this can be added, and nothing else."""
    rotary: bool = True
    """Give the fast weights queries and keys with rotary embedding, where the base model has one; the window's have."""
    gate_bias: tuple[float, float] = (2.0, 6.0)
    """First and last gate bias of a head at the start: time constants spread between e^first and e^last tokens."""
    write_bias: tuple[float, float] = _HALF
    """First and last bias of a head's write gate at the start, in the delta rules: a token writes sigmoid(bias)."""
    gate_rank: int = 0
    """Rank of the gates' matrices, low in a conversion that is to be small; 0 for full ones, as in the paper."""
    positions: Literal["keep", "drop"] = "keep"
    """Absolute positions of GPT-2: keep them (text ends at the trained length) or drop them (text of any length)."""

    def __post_init__(self) -> None:
        for name in ("gate_bias", "write_bias"):
            bias = tuple(getattr(self, name))  # JSON has lists
            if len(bias) != 2 or not all(math.isfinite(number) for number in bias):
                raise FastWeightsError(f"{name} is {bias}; it must be two finite numbers")
            object.__setattr__(self, name, bias)
        make_whole(self, "wide_window", "conv_size", "gate_rank", "sinks")
        check_name("positions", self.positions, POSITIONS)
        for name in _DTYPES:
            check_name(name, getattr(self, name), KEPT_DTYPES)
        if self.write is not None:
            check_name("write", self.write, WRITES)
        if self.gate_rank < 0:
            raise FastWeightsError(f"gate_rank is {self.gate_rank}; allowed are 0 (full) and ranks of 1 up")
        if self.conv_size < 0 or self.conv_size == 1:
            raise FastWeightsError(f"conv_size is {self.conv_size}; allowed are 0 (none) and 2 or more tokens")
        if self.layers is not None:
            self._check_layers(self.layers)
        if self.sinks is not None and self.sinks < 0:
            raise FastWeightsError(f"sinks is {self.sinks}; allowed are 0 (none) and more tokens")
        if self.layer_types is not None and (unknown := sorted(set(self.layer_types) - set(LAYER_TYPES))):
            raise FastWeightsError(f"layer_types has {', '.join(unknown)}; known are {', '.join(LAYER_TYPES)}")

    def _check_layers(self, layers: str) -> None:
        if self.layer_types is not None:
            raise FastWeightsError("layers and layer_types were given, which say the same: leave one out")
        if not _LAYERS.fullmatch(layers):
            raise FastWeightsError(f"layers is {layers}; allowed are numbers such as 0,4-9, auto:N, and none")


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(SharedConversion):
    """How a model's attention becomes fast weights.

    Raises:
        FastWeightsError: if a value is not among those that are allowed.
    """

    rule: str = "decay"
    """Update rule of the fast weights; decay is the paper's, others are in docs/methods.md."""
    feature_map: str = "identity"
    """Feature map of queries and keys; identity is the paper's, others are in docs/methods.md."""
    feature_dim: int | None = None
    """Features that maps which learn them make of a query or key, softmax with either sign: relu, softmax, and those
    within rule delta_and_average; by default as many as a head is wide."""
    window: int = 0
    """Tokens that an exact softmax sees beside the fast weights, 0 for none; the state stays constant either way."""
    windows: list[int] | None = None
    """Per layer the window, 0 in one that is not hybrid; by default `window` and `wide_window`, as `layers` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_whole(self, "window", "feature_dim")
        if self.windows is not None:
            object.__setattr__(self, "windows", [whole_number("windows", window) for window in self.windows])
        others = self.normaliser, self.write_bias != _HALF, self.feature_dim is not None
        if (self.rule, self.feature_map) != _OF_THE_PAPER or any(others):
            self._check_rule_and_feature_map()
        if self.feature_dim is not None and self.feature_dim < 1:
            raise FastWeightsError(f"feature_dim is {self.feature_dim}; allowed are 1 and more features")
        if self.window < 0 or self.window == 1:
            raise FastWeightsError(f"window is {self.window}; allowed are 0 (none) and 2 or more tokens")
        if self.layer_types is not None:
            self._check_layer_types(self.layer_types)
        if self.windows is not None and any(window < 0 or window == 1 for window in self.windows):
            raise FastWeightsError(f"windows is {self.windows}; allowed are 0 (none) and 2 or more tokens")
        if self.wide_window:
            self._check_wide_window()
        if self.window_dtype != AUTO and not self.window:
            raise FastWeightsError(
                f"window_dtype is {self.window_dtype} and window is 0: there is none to keep so; give one, or auto"
            )
        if self.write == "leaving" and not self.window:
            raise FastWeightsError("write is leaving and window is 0: there is no window to leave; give one, or all")
        if self.sinks and not self.window:
            raise FastWeightsError(f"sinks is {self.sinks} and window is 0: sinks stand beside a window of 2 tokens up")

    def _check_rule_and_feature_map(self) -> None:
        from fastweights.layers.feature_maps import FEATURE_MAPS
        from fastweights.layers.rules import RULES

        check_name("rule", self.rule, RULES)
        check_name("feature_map", self.feature_map, FEATURE_MAPS)
        changed = (name for name in OF_GATES if getattr(self, name) != getattr(ConversionConfig, name))
        if unused := [name for name in changed if name not in RULES[self.rule].settings]:
            gates = "has no such gates" if RULES[self.rule].settings else "has no gates"
            raise FastWeightsError(f"rule {self.rule} {gates}: leave {', '.join(unused)} out")
        if self.normaliser and not RULES[self.rule].normalises:
            rules = " or ".join(name for name, rule in RULES.items() if rule.normalises)
            raise FastWeightsError(f"rule {self.rule} has no normaliser: leave it out, or take rule {rules}")
        if self.normaliser and not FEATURE_MAPS[self.feature_map].non_negative:
            maps = ", ".join(name for name, feature_map in FEATURE_MAPS.items() if feature_map.non_negative)
            raise FastWeightsError(
                f"normaliser was given, and with feature_map {self.feature_map} weights may sum to 0: leave it out, or "
                f"take one of {maps}"
            )
        learned = RULES[self.rule].learns_features or FEATURE_MAPS[self.feature_map].learns_features
        if self.feature_dim is not None and not learned:
            maps, rules = ([x for x, row in rows.items() if row.learns_features] for rows in (FEATURE_MAPS, RULES))
            raise FastWeightsError(
                f"feature_dim is {self.feature_dim}, and neither rule {self.rule} nor feature_map {self.feature_map} "
                f"learns features: leave it out, or take feature_map {' or '.join(maps)}, or rule {' or '.join(rules)}"
            )

    def _normalises(self) -> bool:
        if (self.rule, self.feature_map) == _OF_THE_PAPER:
            return False
        from fastweights.layers.feature_maps import FEATURE_MAPS
        from fastweights.layers.rules import RULES

        return RULES[self.rule].normalises and FEATURE_MAPS[self.feature_map].non_negative

    def _check_layer_types(self, layer_types: list[str]) -> None:
        if "hybrid_sliding" in layer_types and not self.window:
            raise FastWeightsError(f"layer_types has hybrid_sliding and window is {self.window}; give a window of 2 up")
        if self.window and "hybrid_sliding" not in layer_types:
            raise FastWeightsError(f"window is {self.window} and layer_types has no hybrid_sliding: none would have it")

    def _check_wide_window(self) -> None:
        if not self.window or self.wide_window <= self.window:
            raise FastWeightsError(
                f"wide_window is {self.wide_window} and window {self.window}: it is for layers with a longer one"
            )
        if self.layers is None and self.windows is None:
            raise FastWeightsError(f"wide_window is {self.wide_window}: say by layers which have the usual one")

    @property
    def layers_kept(self) -> int | None:
        """How many layers `auto` is to leave as they are; None if it says itself which are converted."""
        automatic = self.layers is not None and self.layers.startswith(_AUTOMATIC)
        return int(self.layers.removeprefix(_AUTOMATIC)) if self.layers is not None and automatic else None

    def converting(self, chosen: Collection[int], layers: int, local: Collection[int] = ()) -> ConversionConfig:
        """The same, with these of so many layers converted.

        Args:
            chosen: those that `layers` does not leave out.
            layers: of the base model.
            local: those that have a window of their own, and stay as they are unless they are chosen.
        """
        fast = "hybrid_sliding" if self.window else "linear_attention"
        if not self.wide_window:
            types = [fast if i in chosen else "full_attention" for i in range(layers)]
            return replace(self, layers=None, layer_types=types)
        wide = [0 if i in local else self.wide_window for i in range(layers)]
        windows = [self.window if i in chosen else wide[i] for i in range(layers)]
        types = [fast if window else "full_attention" for window in windows]
        return replace(self, layers=None, layer_types=types, windows=windows)

    def with_window(self, window: int, wide_window: int | None = None) -> ConversionConfig:
        """The same with another window in all layers but those with the wide one, as long as that is the wider.

        Args:
            window: of most layers.
            wide_window: another for those that have a wide one; by default theirs.
        """
        wide = self.wide_window if wide_window is None or not self.wide_window else wide_window
        wide = wide if wide > window else 0
        becomes = {self.window: window} | ({self.wide_window: wide or window} if self.wide_window else {})
        windows = self.windows and [becomes.get(own, own) for own in self.windows]
        return replace(self, window=window, wide_window=wide, windows=windows)

    def _named_layers(self, layers: int, local: Collection[int]) -> set[int]:
        if self.layers is None:
            return set(range(layers)) - set(local)
        if self.layers_kept is not None:
            raise FastWeightsError(
                f"layers is {self.layers}, which takes a model and a text: use fastweights convert, or choose_layers"
            )
        if self.layers == _NONE:
            return set()
        spans = [[int(end) for end in span.split("-")] for span in self.layers.split(",")]
        if any(not span[0] <= span[-1] < layers for span in spans):
            raise FastWeightsError(f"layers is {self.layers}; the base model has layers 0 to {layers - 1}")
        return {i for span in spans for i in range(span[0], span[-1] + 1)}

    def for_layers(self, layers: int, local: Collection[int] = ()) -> ConversionConfig:
        """The same with a type for each of so many layers, and a number of sinks.

        Args:
            layers: of the base model.
            local: those that have a window of their own, and stay as they are unless they are named.

        Raises:
            FastWeightsError: if `layer_types` has another number of entries, or `layers` others than the model's.
        """
        if self.layer_types is None:
            return self.converting(self._named_layers(layers, local), layers, local).for_layers(layers)
        layer_types = self.layer_types
        if len(layer_types) != layers:
            raise FastWeightsError(f"layer_types has {len(layer_types)} entries; the base model has {layers} layers")
        windows = self.windows or [self.window if kind == "hybrid_sliding" else 0 for kind in layer_types]
        if [bool(window) for window in windows] != [kind == "hybrid_sliding" for kind in layer_types]:
            raise FastWeightsError(f"windows is {windows}; there must be one for each of {', '.join(layer_types)}")
        if self.softmax_dtype != AUTO and "full_attention" not in layer_types:
            raise FastWeightsError(
                f"softmax_dtype is {self.softmax_dtype} and no layer keeps its softmax attention; leave it out, or say"
                " by layers which do"
            )
        if self.window and self.window not in windows:
            raise FastWeightsError(f"window is {self.window} and windows {windows}: give one that some layer has")
        sinks = (_SINKS if self.window else 0) if self.sinks is None else self.sinks
        write = self.write or ("leaving" if self.window else "all")
        normaliser = self._normalises() if self.normaliser is None else self.normaliser
        settled = {"windows": list(windows), "sinks": sinks, "write": write, "normaliser": normaliser}
        return replace(self, layer_types=list(layer_types), **settled)
