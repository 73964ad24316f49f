"""How fields of the configs show as options on the command line; the configs themselves know nothing of it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_origin, get_type_hints

from cyclopts import Parameter

from fastweights.cli.demo import DemoConfig
from fastweights.data import DataConfig, HeldOutDataConfig
from fastweights.evaluation.comparison import ComparisonConfig
from fastweights.evaluation.dynamic_evaluation import DynamicEvaluationConfig, RmsConfig
from fastweights.evaluation.perplexity import EvaluationConfig, HeldOutConfig
from fastweights.layers.fast_weight_layer import FastWeightLayerSettings
from fastweights.models.conversion import ConversionConfig
from fastweights.training.config import (
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

SHOW_ALL = "FASTWEIGHTS_ALL_OPTIONS"
"""Environment variable that, set to anything, makes help list every option."""

_STAGE = ("gradient_accumulation", "schedule", "weight_decay")
_DYNAMIC = ("parameters", "epsilon")
_EVALUATION = ("context", "stride", "batch_size", "max_tokens", "carry_documents")
_DATA = ("text_config", "text_column", "join_rows")

ADVANCED: dict[type, tuple[str, ...]] = {
    ComparisonConfig: ("sgd", "rms", "statistics_blocks"),
    ConversionConfig: ("rule", "feature_map", "layer_types", "value_gate", "rotary", "gate_bias"),
    DataConfig: _DATA,
    DemoConfig: (),
    DynamicEvaluationConfig: _DYNAMIC,
    EvaluationConfig: _EVALUATION,
    FastWeightLayerSettings: (),
    FinetuneConfig: _STAGE,
    GPT2Shape: (),
    HeldOutConfig: _EVALUATION,
    HeldOutDataConfig: _DATA,
    LongStageConfig: _STAGE,
    MetaConfig: _STAGE,
    PretrainConfig: (),
    RmsConfig: _DYNAMIC,
    RunConfig: ("seed", "adam_beta2", "max_grad_norm", "save_every", "log_every", "report_to"),
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
            parameter = _parameter(hints[field.name], field, show=show_all or field.name not in advanced)
            config.__annotations__[field.name] = Annotated[hints[field.name], parameter]


def _parameter(hint: Any, field: dataclasses.Field, *, show: bool) -> Parameter:
    arguments: dict[str, Any] = {"show": show}
    if hint is bool:  # on unless --no-... is given, or off and without such a name
        arguments |= {"negative": None, "negative_bool": "no-"} if field.default is True else {"negative": ()}
    if _takes_several(hint):
        arguments["consume_multiple"] = True  # --contexts block stream
    return Parameter(**arguments)


def _takes_several(hint: Any) -> bool:
    """Whether a value is a list, or a tuple of any length; or one of these or None."""
    options = getattr(hint, "__args__", ()) if get_origin(hint) not in (list, tuple) else (hint,)
    return any(
        get_origin(option) is list or (get_origin(option) is tuple and option.__args__[-1] is ...) for option in options
    )
