"""Dynamic evaluation: the definition, and a model that is bit for bit what it was afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastweights.data import tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.dynamic_evaluation import DynamicEvaluation, gradient_mean_squares
from fastweights.evaluation.perplexity import evaluate, score
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import DynamicEvaluationConfig, EvaluationConfig
from tests.conftest import make_gpt2, make_llama, random_ids

TEXT = "the same few words, the same few words, and the same few words again. " * 6


def weights(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["softmax", "hybrid", "fast weight layer"])
@pytest.mark.parametrize("rule", ["sgd", "rms"])
@pytest.mark.parametrize("context", ["block", "stream"])
def test_adapts_to_repetition_and_leaves_no_trace(tokenizer, make, kind, rule, context):
    model = make()
    if kind == "hybrid":
        model = convert(model, ConversionConfig(window=4, positions="drop"))
    elif kind == "fast weight layer":
        model = add_fast_weight_layer(model)
    text = tokenize([TEXT], tokenizer)
    settings = EvaluationConfig(context=context)
    static = evaluate(model, text, block_size=64, config=settings)
    config = DynamicEvaluationConfig(rule=rule, segment=16, learning_rate=0.02 if rule == "sgd" else 1e-4, decay=1e-3)
    mean_squares = gradient_mean_squares(model, random_ids(2, 65), config) if rule == "rms" else None
    before = weights(model)
    with DynamicEvaluation(model, config, mean_squares) as dynamic_evaluation:
        dynamic = evaluate(model, text, block_size=64, config=settings, dynamic_evaluation=dynamic_evaluation)
        assert not unchanged(model, before)
    assert unchanged(model, before)
    assert dynamic.tokens == static.tokens
    assert dynamic.loss < static.loss - 0.1
    assert evaluate(model, text, block_size=64, config=settings).loss == static.loss


def test_sgd_is_a_step_after_each_segment_and_a_way_back(tokenizer):
    model, text = make_gpt2(), tokenize(["abcdefgh" * 3], tokenizer)
    config = DynamicEvaluationConfig(segment=8, learning_rate=0.1, decay=0.25)
    copy, original = make_gpt2(), make_gpt2()
    expected = []
    for start in range(0, 24, 8):
        # One block: later segments see the keys and values that earlier weights made, so only a fresh block is simple.
        ids = text.tokens[start : start + 9]
        loss = cross_entropy(copy(ids[None, :-1]).logits[0], ids[1:], reduction="none")
        expected.append(loss.detach())
        copy.zero_grad()
        loss.mean().backward()
        with torch.no_grad():
            for parameter, trained in zip(copy.parameters(), original.parameters(), strict=True):
                parameter += 0.25 * (trained - parameter) - 0.1 * parameter.grad
    with DynamicEvaluation(model, config) as dynamic_evaluation:
        losses = [x for _, x in score(model, text, block_size=8, dynamic_evaluation=dynamic_evaluation)]
    torch.testing.assert_close(torch.cat(losses), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_rms_divides_by_the_size_of_training_gradients():
    model, ids = make_gpt2(), random_ids(1, 17)[0]
    config = DynamicEvaluationConfig(
        rule="rms", segment=16, learning_rate=1e-3, decay=0.1, parameters=r".*c_fc\.weight"
    )
    mean_squares = gradient_mean_squares(model, [ids], config)
    copy = make_gpt2()
    cross_entropy(copy(ids[None, :-1]).logits[0], ids[1:]).backward()
    named = dict(copy.named_parameters())
    for name, mean_square in mean_squares.items():
        torch.testing.assert_close(mean_square, named[name].grad ** 2)
    roots = {name: x.sqrt() for name, x in mean_squares.items()}
    mean = torch.cat([root.flatten() for root in roots.values()]).mean()
    block = ids[None]
    from fastweights.reading.stream import Stream

    with DynamicEvaluation(model, config, mean_squares) as dynamic_evaluation:
        dynamic_evaluation.score(Stream(model, 16), block[:, :-1], block[:, 1:])
        dynamic_evaluation.score(Stream(model, 16), block[:, :-1], block[:, 1:])
        adapted = weights(model)
    trained = {name: x.detach().clone() for name, x in named.items()}
    for _ in range(2):
        copy.zero_grad()
        cross_entropy(copy(block[:, :-1]).logits[0], block[0, 1:]).backward()
        with torch.no_grad():
            for name, root in roots.items():
                back = (0.1 * root / mean).clamp(max=1) * (trained[name] - named[name])
                named[name] += back - 1e-3 * named[name].grad / (root + 1e-5)
    for name, x in copy.state_dict().items():
        torch.testing.assert_close(adapted[name], x, rtol=1e-5, atol=1e-6)


def test_only_what_the_pattern_matches_adapts(tokenizer):
    model = make_gpt2()
    before = weights(model)
    config = DynamicEvaluationConfig(parameters=r"transformer\.h\.2\..*")
    with DynamicEvaluation(model, config) as dynamic_evaluation:
        evaluate(model, tokenize([TEXT], tokenizer), block_size=64, dynamic_evaluation=dynamic_evaluation)
        changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all(name.startswith("transformer.h.2.") for name in changed)


def test_an_error_inside_leaves_no_trace_either(tokenizer):
    model = make_gpt2().train()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    gradient = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = gradient
    before = weights(model)

    def interrupted():
        with DynamicEvaluation(model, DynamicEvaluationConfig()) as dynamic_evaluation:
            next(score(model, tokenize([TEXT], tokenizer), block_size=64, dynamic_evaluation=dynamic_evaluation))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert unchanged(model, before)
    assert model.training
    assert model.lm_head.weight.grad is gradient
    assert [p.requires_grad for p in model.parameters()].count(True) == 1


def test_even_a_diverged_model_comes_back(tokenizer):
    model = make_gpt2()
    before = weights(model)
    with DynamicEvaluation(model, DynamicEvaluationConfig(learning_rate=1e6)) as dynamic_evaluation:
        loss = evaluate(model, tokenize([TEXT], tokenizer), block_size=64, dynamic_evaluation=dynamic_evaluation).loss
    assert not loss < 10
    assert unchanged(model, before)
    assert not any(math.isnan(x) for x in before["lm_head.weight"].flatten().tolist())


def test_streams_start_each_document_with_the_trained_weights(tokenizer):
    model = make_gpt2()
    text = tokenize([TEXT, TEXT], tokenizer)
    with DynamicEvaluation(model, DynamicEvaluationConfig(segment=16, learning_rate=0.02)) as dynamic_evaluation:
        config = EvaluationConfig(context="stream")
        losses = torch.cat(
            [x for _, x in score(model, text, block_size=64, config=config, dynamic_evaluation=dynamic_evaluation)]
        )
    first, second = losses.chunk(2)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rule": "adam"}, "known are sgd, rms"),
        ({"learning_rate": 0.0}, "positive"),
        ({"decay": 2.0}, "0 to 1"),
        ({"segment": 0}, "at least 1"),
    ],
)
def test_bad_settings(arguments, expected):
    with pytest.raises(FastWeightsError, match=expected):
        DynamicEvaluationConfig(**arguments)


def test_bad_uses(tokenizer):
    model = make_gpt2()
    with pytest.raises(FastWeightsError, match="matches none"):
        DynamicEvaluation(model, DynamicEvaluationConfig(parameters="nothing"))
    with pytest.raises(FastWeightsError, match="no pattern"):
        DynamicEvaluation(model, DynamicEvaluationConfig(parameters="("))
    with pytest.raises(FastWeightsError, match="gradient_mean_squares"):
        DynamicEvaluation(model, DynamicEvaluationConfig(rule="rms"))
    with pytest.raises(FastWeightsError, match="at least one block"):
        gradient_mean_squares(model, [], DynamicEvaluationConfig())
    with (
        DynamicEvaluation(model, DynamicEvaluationConfig()) as dynamic_evaluation,
        pytest.raises(FastWeightsError, match="sliding"),
    ):
        evaluate(
            model,
            tokenize([TEXT], tokenizer),
            block_size=8,
            config=EvaluationConfig(context="sliding"),
            dynamic_evaluation=dynamic_evaluation,
        )
