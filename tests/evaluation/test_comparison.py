"""Methods side by side, and where they gain."""

from __future__ import annotations

import math

import pytest
import torch

from fastweights.data import tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.comparison import _downhill, compare, tune, without_layer
from fastweights.evaluation.gains import _by_power_of_four, earlier_occurrences, gains, places
from fastweights.evaluation.parts import PARTS, evaluate_parts
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.evaluation.perplexity import evaluate
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import ComparisonConfig, DynamicEvaluationConfig, EvaluationConfig
from tests.conftest import make_gpt2

TEXT = "the same few words, the same few words, and the same few words again. " * 5


@pytest.fixture
def text(tokenizer):
    return tokenize([TEXT, "another text of some length " * 4], tokenizer)


@pytest.fixture
def model():
    model = add_fast_weight_layer(make_gpt2())
    with torch.no_grad():
        model.fast_weight_layer.output_scale.fill_(0.3)
    return model


def test_all_methods_in_all_contexts_on_the_same_tokens(model, text):
    config = ComparisonConfig(
        methods=("static", "fwl", "sgd", "rms"),
        contexts=("block", "stream"),
        sgd=DynamicEvaluationConfig(segment=16),
        rms=DynamicEvaluationConfig(rule="rms", segment=16),
    )
    before = {name: x.clone() for name, x in model.state_dict().items()}
    layer = model.fast_weight_layer
    results = compare(model, text, config, block_size=64, training=text)
    assert [(r.method, r.context) for r in results] == [
        (method, context) for context in ("block", "stream") for method in ("static", "fwl", "sgd", "rms")
    ]
    assert {r.evaluation.tokens for r in results} == {len(text.tokens) - 2}
    assert results[0].time_ratio == 1
    assert model.fast_weight_layer is layer
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    by_name = {(r.method, r.context): r for r in results}
    with without_layer(model):
        static = evaluate(model, text, block_size=64).loss
    assert by_name["static", "block"].evaluation.loss == pytest.approx(static, rel=1e-5)
    assert by_name["fwl", "block"].evaluation.loss == pytest.approx(evaluate(model, text, block_size=64).loss, rel=1e-5)
    for result in results:
        scored = result.losses[~result.losses.isnan()]
        assert scored.double().mean().item() == pytest.approx(result.evaluation.loss, rel=1e-5)


def test_sliding_and_defaults(model, text):
    results = compare(model, text, ComparisonConfig(contexts=("sliding",)), block_size=64)
    assert [(r.method, r.context) for r in results] == [("static", "block"), ("static", "sliding"), ("fwl", "sliding")]


def test_parts_of_a_hybrid_model_are_rows_like_any(text):
    base = make_gpt2()
    model = add_fast_weight_layer(convert(base, ConversionConfig(window=8)))
    with torch.no_grad():
        model.fast_weight_layer.output_scale.fill_(0.3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    results = compare(model, text, ComparisonConfig(contexts=("block", "stream")), block_size=64, teacher=base)
    assert [r.name for r in results] == [
        f"{method}, {context}" for context in ("block", "stream") for method in ("static", "fwl", *PARTS)
    ]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with without_layer(model):
        expected = evaluate_parts(model, base, text, block_size=64, config=EvaluationConfig(batch_size=1))
    for result in results[:6]:
        if result.method != "fwl":
            known = expected["all" if result.method == "static" else result.method]
            assert result.evaluation.loss == pytest.approx(known.loss, rel=1e-6)
        assert sum(r.tokens for r in result.by_position) == result.evaluation.tokens
    with pytest.raises(FastWeightsError, match="no parts"):
        compare(base, text, ComparisonConfig(), block_size=64, teacher=base)


def test_tuning_takes_the_best_of_what_it_tries(text):
    model, evaluation = make_gpt2(), EvaluationConfig(max_tokens=200)
    best = tune(model, text, DynamicEvaluationConfig(segment=16), 64, evaluation)

    def loss(config):
        from fastweights.evaluation.dynamic_evaluation import DynamicEvaluation

        with DynamicEvaluation(model, config) as dynamic_evaluation:
            return evaluate(model, text, block_size=64, config=evaluation, dynamic_evaluation=dynamic_evaluation).loss

    assert loss(best) <= min(loss(DynamicEvaluationConfig(segment=16, learning_rate=x)) for x in (1e-4, 1e-1, 1.0))


@pytest.mark.parametrize(
    ("losses", "bottom", "asked"),
    [
        ([5, 4, 3, 4, 5], 2, {1, 2, 3}),
        ([1, 2, 3, 4, 5], 0, {0, 1, 2, 3}),
        ([5, 4, 3, 2, 1], 4, {1, 2, 3, 4}),
        ([2, 1, math.inf, math.inf, math.inf], 1, {0, 1, 2}),
        ([math.inf] * 5, 0, {0, 1, 2}),
        ([3, 3, 3, 3, 3], 2, {1, 2, 3}),
    ],
)
def test_a_valley_is_gone_down_from_its_middle(losses, bottom, asked):
    tried = set()

    def loss(candidate):
        tried.add(candidate)
        return losses[candidate]

    assert _downhill(range(5), loss) == bottom
    assert tried == asked


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"methods": ("magic",)}, "known are static, fwl, sgd, rms"),
        ({"contexts": ("magic",)}, "known are block, sliding, stream"),
        ({"methods": ("sgd",), "contexts": ("sliding",)}, "each token once"),
        ({"contexts": ()}, "at least one"),
    ],
)
def test_bad_settings(arguments, expected):
    with pytest.raises(FastWeightsError, match=expected):
        ComparisonConfig(**arguments)


def test_what_is_missing_is_said(text):
    with pytest.raises(FastWeightsError, match="no Fast Weight Layer"):
        compare(make_gpt2(), text, ComparisonConfig(methods=("fwl",)), block_size=64)
    with pytest.raises(FastWeightsError, match="training text"):
        compare(make_gpt2(), text, ComparisonConfig(methods=("rms",)), block_size=64)
    with pytest.raises(FastWeightsError, match="validation text"):
        compare(make_gpt2(), text, ComparisonConfig(methods=("sgd",), tune_tokens=100), block_size=64)


def test_groups_of_tokens(tokenizer):
    text = tokenize(["abca", "aab"], tokenizer)  # each ended by one more token
    assert places(text, 9).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert earlier_occurrences(text, 9).tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert earlier_occurrences(text, 7).tolist() == [0, 0, 0, 1, 0, 0, 1]


def test_gains_of_groups():
    values = torch.tensor([0] * 200 + [3] * 200 + [4] * 150 + [70] * 50)
    gain = torch.where(values == 4, 2.0, 1.0) * math.log(2)
    gain[0] = float("nan")
    found = [(g.group, g.tokens, round(g.bits, 6)) for g in _by_power_of_four(values, gain)]
    assert found == [("0", 199, 1.0), ("1–3", 200, 1.0), ("4–15", 150, 2.0)]


def test_gains_say_where_a_method_gains(model, tokenizer):
    text = tokenize([TEXT * 3], tokenizer)
    results = compare(model, text, ComparisonConfig(methods=("static", "fwl")), block_size=64)
    found = gains(results, text)
    assert len(found) == 3
    for rows in found.values():
        assert list(rows) == ["fwl, block"]
        total = sum(g.bits * g.tokens for g in rows["fwl, block"]) / sum(g.tokens for g in rows["fwl, block"])
        expected = (results[0].evaluation.loss - results[1].evaluation.loss) / math.log(2)
        assert total == pytest.approx(expected, abs=0.05)


def test_what_diverged_on_the_way_says_nothing_of_its_first_tokens(model, tokenizer):
    text = tokenize([TEXT * 3], tokenizer)
    settings = ComparisonConfig(methods=("static", "sgd"), sgd=DynamicEvaluationConfig(learning_rate=1e8))
    static, sgd = compare(model, text, settings, block_size=64)
    assert not math.isfinite(sgd.evaluation.loss)
    assert static.by_position
    assert not sgd.by_position
    assert all(not rows for rows in gains([static, sgd], text).values())


def test_peak_memory_sees_what_is_made_and_given_back():
    with PeakMemory(torch.device("cpu")) as peak:
        x = torch.ones(30_000_000)
        del x
    if peak.bytes is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert 100e6 < peak.bytes < 200e6
