import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.data import tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation import EvaluationConfig, _windows, evaluate
from tests.conftest import make_gpt2


@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 9), st.sampled_from(["block", "sliding"]))
@settings(max_examples=200, deadline=None)
def test_every_token_is_counted_once(length, size, stride, context):
    config = EvaluationConfig(context=context, stride=min(stride, size - 1), batch_size=2)
    counted = []
    for windows, new in _windows(torch.arange(length), size, config):
        assert new < windows.shape[1] <= size
        for window in windows:
            counted += window[-new:].tolist()
    first_of_block = context == "block"
    assert counted == [i for i in range(1, length) if not (first_of_block and i % size == 0)]


def test_loss_is_the_models_own(tokenizer):
    model = make_gpt2()
    text = tokenize(["some text to predict"], tokenizer)
    result = evaluate(model, text, block_size=64)
    expected = model(input_ids=text.tokens[None], labels=text.tokens[None]).loss.item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == len(text.tokens) - 1
    bits_per_token = expected / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits_per_token * len(text.tokens) / text.n_bytes, rel=1e-5)


def test_sliding_equals_block_on_one_window(tokenizer):
    text = tokenize(["abc" * 10], tokenizer)
    losses = [
        evaluate(make_gpt2(), text, block_size=64, config=EvaluationConfig(context=context)).loss
        for context in ("block", "sliding")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_model_keeps_its_mode(tokenizer):
    model = make_gpt2().train()
    evaluate(model, tokenize(["abc"], tokenizer), block_size=8)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"context": "stream"}, "block, sliding"),
        ({"stride": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_settings(arguments, expected):
    with pytest.raises(FastWeightsError, match=expected):
        EvaluationConfig(**arguments)


def test_too_little_text(tokenizer):
    text = tokenize(["abc"], tokenizer)
    with pytest.raises(FastWeightsError, match="at least 2"):
        evaluate(make_gpt2(), text, block_size=64, config=EvaluationConfig(max_tokens=1))
    with pytest.raises(FastWeightsError, match="smaller than block_size"):
        evaluate(make_gpt2(), text, block_size=4, config=EvaluationConfig(context="sliding", stride=4))
