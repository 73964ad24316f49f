"""How fields of the configs show as options on the command line; the configs themselves know nothing of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from cyclopts import Parameter

from fastweights.settings.conversion import ConversionConfig, SharedConversion
from fastweights.settings.demo import DemoConfig
from fastweights.settings.evaluation import (
    ComparisonConfig,
    DynamicEvaluationConfig,
    EvaluationConfig,
    HeldOutConfig,
    RecallConfig,
    RmsConfig,
)
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.grid import GridConfig
from fastweights.settings.sampling import SamplingConfig
from fastweights.settings.text import DataConfig, HeldOutDataConfig
from fastweights.settings.training import (
    FinetuneConfig,
    GPT2Shape,
    LongStageConfig,
    MetaConfig,
    PretrainConfig,
    RunConfig,
    ShortStageConfig,
    TrainConfig,
    TransferConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cyclopts import Token

SHOW_ALL = "FASTWEIGHTS_ALL_OPTIONS"
"""Environment variable that, set to anything, makes help list every option."""

_STAGE = ("gradient_accumulation", "schedule", "weight_decay")
_DYNAMIC = ("parameters", "epsilon")
_EVALUATION = ("context", "stride", "batch_size", "max_tokens", "carry_documents")
_DATA = ("text_config", "text_column", "join_rows")

_CONVERSION = ("normaliser", "layer_types", "value_gate", "rotary", "gate_bias")

ADVANCED: dict[type, tuple[str, ...]] = {
    ComparisonConfig: ("sgd", "rms", "statistics_blocks"),
    ConversionConfig: ("rule", "feature_map", *_CONVERSION),
    DataConfig: _DATA,
    DemoConfig: (),
    DynamicEvaluationConfig: _DYNAMIC,
    EvaluationConfig: _EVALUATION,
    FastWeightLayerSettings: (),
    FinetuneConfig: _STAGE,
    GPT2Shape: (),
    GridConfig: (),
    HeldOutConfig: (*_EVALUATION, "parts_tokens"),
    HeldOutDataConfig: _DATA,
    LongStageConfig: _STAGE,
    MetaConfig: _STAGE,
    PretrainConfig: (),
    RecallConfig: ("repeats", "seed"),
    RmsConfig: _DYNAMIC,
    RunConfig: ("seed", "adam_beta2", "max_grad_norm", "save_every", "save_minutes", "log_every", "report_to"),
    SamplingConfig: (),
    SharedConversion: _CONVERSION,
    ShortStageConfig: _STAGE,
    TrainConfig: (),
    TransferConfig: (*_STAGE, "calibrate"),
}
"""Every config, and those of its fields that are taken like any option and listed in docs/cli.md, but left out of a
command's help so that this fits on one screen."""


def declare_options(*, show_all: bool) -> None:
    """Tell cyclopts, by the annotations of each config, how its fields are given.

    Args:
        show_all: have help list every option.
    """
    for config, advanced in ADVANCED.items():
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            parameter = _parameter(hints[field.name], show=show_all or field.name not in advanced)
            config.__annotations__[field.name] = Annotated[hints[field.name], parameter]


def take_whole_numbers(command: Callable) -> None:
    """Have a command refuse 2.5 where an argument of its own is a whole number; cyclopts would round it."""
    for name, hint in get_type_hints(command, include_extras=True).items():
        if _is_whole(hint):
            command.__annotations__[name] = Annotated[hint, Parameter(converter=_whole_numbers)]


def _parameter(hint: Any, *, show: bool) -> Parameter:
    arguments: dict[str, Any] = {"show": show}
    if _is_whole(hint):
        arguments["converter"] = _whole_numbers
    if hint in (bool, bool | None):  # whatever the default is, a recipe may say the other
        arguments |= {"negative": None, "negative_bool": "no-"}
    if _takes_several(hint):
        arguments["consume_multiple"] = True  # --contexts block stream
    return Parameter(**arguments)


def _takes_several(hint: Any) -> bool:
    """Whether a value is a list, or a tuple of any length; or one of these or None."""
    options = getattr(hint, "__args__", ()) if get_origin(hint) not in (list, tuple) else (hint,)
    return any(
        get_origin(option) is list or (get_origin(option) is tuple and option.__args__[-1] is ...) for option in options
    )


def _is_whole(hint: Any) -> bool:
    return hint in (int, int | None, tuple[int, ...])


def _whole_numbers(hint: Any, tokens: Sequence[Token]) -> int | tuple[int, ...]:
    numbers = []
    for token in tokens:
        try:
            numbers.append(int(token.value))
        except ValueError:
            raise ValueError(f"{token.value!r} is no whole number") from None
    return tuple(numbers) if get_origin(hint) is tuple else numbers[0]
