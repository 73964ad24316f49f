"""Settings that would do nothing are refused."""

import pytest

from fastweights import (
    ConversionConfig,
    EvaluationConfig,
    FastWeightsError,
    MetaConfig,
    SamplingConfig,
    TrainConfig,
    TransferConfig,
)
from fastweights.evaluation.comparison import compare
from fastweights.settings.demo import DemoConfig
from fastweights.settings.evaluation import ComparisonConfig, DynamicEvaluationConfig, RmsConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.training import GPT2Shape


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "all", "meta": MetaConfig(steps=5)},
        {"stage": "all", "fast_weight_layer": FastWeightLayerSettings(expansion=2)},
        {"stage": "finetune", "transfer": TransferConfig(steps=5)},
        {"stage": "meta", "convert": ConversionConfig(window=4)},
        {"stage": "meta", "teacher": "embedded"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_of_stages_that_are_not_trained(settings):
    with pytest.raises(FastWeightsError, match="has no use for it"):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("comparison", "evaluation"),
    [
        ({}, {"batch_size": 2}),
        ({}, {"stride": 8}),
        ({}, {"carry_documents": True}),
        ({"tune_tokens": 100}, {}),
        ({"sgd": DynamicEvaluationConfig(decay=0.1), "methods": ("rms",)}, {}),
        ({"rms": RmsConfig(decay=0.1), "methods": ("sgd",)}, {}),
        ({"statistics_blocks": 2, "methods": ("sgd",)}, {}),
    ],
)
def test_of_methods_and_contexts_that_are_not_compared(comparison, evaluation):
    with pytest.raises(FastWeightsError, match="was given, but"):
        compare(None, None, ComparisonConfig(**comparison), evaluation=EvaluationConfig(**evaluation))  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"value_gate": False}, {"gate_bias": (0.0, 1.0)}])
def test_of_gates_that_a_rule_has_not(settings):
    with pytest.raises(FastWeightsError, match="has no gates"):
        ConversionConfig(rule="add", **settings)


@pytest.mark.parametrize(
    "sizes", [{"heads": 0}, {"layers": 0}, {"hidden_size": 0}, {"heads": -1}, {"hidden_size": 9, "heads": 3}]
)
def test_a_transformer_that_cannot_be(sizes):
    with pytest.raises(FastWeightsError, match="it must be"):
        GPT2Shape(**sizes)


@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"meta_steps": 0}, {"tokens": 0}, {"held_out_tokens": 1}, {"read_tokens": 0}]
)
def test_a_demo_of_nothing(settings):
    with pytest.raises(FastWeightsError, match="at least"):
        DemoConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 0},
        {"length": 0},
        {"batch_size": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"seed": -1},
        {"precision": "fp8"},
    ],
    ids=str,
)
def test_samples_of_nothing(settings):
    with pytest.raises(FastWeightsError, match=next(iter(settings))):
        SamplingConfig(**settings)
