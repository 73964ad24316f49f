import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.data import tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.perplexity import _spans, by_position, evaluate, plain, score
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import CONTEXTS, EvaluationConfig
from tests.conftest import make_gpt2


@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 8), st.sampled_from(["block", "sliding"]))
@settings(max_examples=200, deadline=None)
def test_spans_count_every_token_but_the_first_once(length, size, stride, context):
    config = EvaluationConfig(context=context, stride=min(stride, size - 1))
    counted = []
    for start, stop, new in _spans(length, size, config):
        assert 0 < new <= stop - start <= size
        counted += range(stop - new + 1, stop + 1)
    assert counted == list(range(1, length))


@pytest.fixture
def documents(tokenizer):
    return tokenize(
        ["one text, that is not long", "b", "", "another, a longer one, of two blocks and more " * 3], tokenizer
    )


MODELS = {
    "softmax": make_gpt2,
    "pure": lambda: convert(make_gpt2(), ConversionConfig(positions="drop")),
    "pure, positions kept": lambda: convert(make_gpt2()),
    "hybrid, positions kept": lambda: convert(make_gpt2(), ConversionConfig(window=4)),
    "one layer converted": lambda: convert(
        make_gpt2(), ConversionConfig(layer_types=["linear_attention", "full_attention", "full_attention"])
    ),
    "fast weight layer": lambda: add_fast_weight_layer(make_gpt2()),
    "fast weight layer on pure, positions kept": lambda: add_fast_weight_layer(convert(make_gpt2())),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_all_contexts_score_the_same_tokens(documents, kind):
    model = MODELS[kind]()
    firsts = {0, *torch.tensor(documents.document_lengths).cumsum(0).tolist()}
    expected = [i for i in range(len(documents.tokens)) if i not in firsts]
    for context in ("block", "sliding", "stream"):
        config = EvaluationConfig(context=context, stride=5, batch_size=2)
        positions, losses = (
            torch.cat(x) for x in zip(*score(model, documents, block_size=16, config=config), strict=True)
        )
        assert positions.tolist() == expected
        assert losses.isfinite().all()


def test_a_stream_of_a_recurrent_model_is_one_pass_over_each_document(documents):
    model = convert(make_gpt2(), ConversionConfig(window=4, positions="drop")).eval()
    losses = torch.cat(
        [x for _, x in score(model, documents, block_size=16, config=EvaluationConfig(context="stream"))]
    )
    whole = []
    for document in documents.tokens.split(documents.document_lengths):
        with torch.no_grad():
            logits = model(document[None]).logits[0, :-1]
        whole.append(torch.nn.functional.cross_entropy(logits, document[1:], reduction="none"))
    torch.testing.assert_close(losses, torch.cat(whole), rtol=1e-5, atol=1e-5)


def test_a_softmax_model_streams_as_blocks_and_its_fast_weight_layer_goes_on(tokenizer):
    text = tokenize(["ab" * 60], tokenizer)
    model = add_fast_weight_layer(make_gpt2()).eval()
    stream = EvaluationConfig(context="stream")
    assert evaluate(model, text, block_size=16, config=stream).loss == pytest.approx(
        evaluate(model, text, block_size=16).loss, rel=1e-5
    )
    with torch.no_grad():
        model.fast_weight_layer.output_scale.normal_()
    assert evaluate(model, text, block_size=16, config=stream).loss != pytest.approx(
        evaluate(model, text, block_size=16).loss, rel=1e-5
    )


def test_carrying_documents_changes_what_later_ones_cost(documents):
    model = convert(make_gpt2(), ConversionConfig(positions="drop"))
    apart, joined = (
        torch.cat(
            [
                losses
                for _, losses in score(
                    model, documents, block_size=16, config=EvaluationConfig(context="stream", carry_documents=carry)
                )
            ]
        )
        for carry in (False, True)
    )
    first = documents.document_lengths[0] - 1
    torch.testing.assert_close(apart[:first], joined[:first], rtol=1e-5, atol=1e-5)
    assert (apart[first:] - joined[first:]).abs().min() > 0


def test_loss_is_the_models_own(tokenizer):
    model = make_gpt2()
    text = tokenize(["some text to predict"], tokenizer)
    result = evaluate(model, text, block_size=64)
    expected = model(input_ids=text.tokens[None], labels=text.tokens[None]).loss.item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == len(text.tokens) - 1
    bits_per_token = expected / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits_per_token * len(text.tokens) / sum(text.document_bytes), rel=1e-5)


def test_bits_per_byte_are_those_of_what_was_read(tokenizer):
    model = make_gpt2()
    texts = ["漢字かな " * 4, "plain words " * 8]
    first = tokenize(texts[:1], tokenizer)
    both = replace(tokenize(texts, tokenizer), document_bytes=[1000, 96])  # as if its tokens were of many bytes
    limit = EvaluationConfig(max_tokens=len(first.tokens))
    alone = evaluate(model, replace(first, document_bytes=[1000]), block_size=64)
    beside = evaluate(model, both, block_size=64, config=limit)
    assert beside == alone


def test_loss_by_position_in_the_document(tokenizer, monkeypatch):
    monkeypatch.setattr("fastweights.evaluation.perplexity.POSITIONS", (4, 8, 100))
    text = tokenize(["x" * 9, "y" * 5], tokenizer)  # each has one more token
    losses = torch.arange(16.0)
    losses[[0, 10]] = math.nan
    found = [(r.start, r.stop, r.tokens, r.loss) for r in by_position(losses, text)]
    assert found == [
        (0, 4, 6, (1 + 2 + 3 + 11 + 12 + 13) / 6),
        (4, 8, 6, (4 + 5 + 6 + 7 + 14 + 15) / 6),
        (8, 100, 2, (8 + 9) / 2),
    ]
    assert [(r.start, r.tokens) for r in by_position(losses[:7], text)] == [(0, 3), (4, 3)]
    monkeypatch.setattr("fastweights.evaluation.perplexity.POSITIONS", (4,))
    assert by_position(losses, text)[-1].stop is None


def test_a_model_that_is_not_finite_is_refused(tokenizer):
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[0] = math.nan
    with pytest.raises(FastWeightsError, match="the loss is nan"):
        evaluate(model, tokenize(["some text"], tokenizer), block_size=64)


def test_what_json_has_no_number_for():
    data = {"a": [1.0, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": 3}}
    assert plain(data) == {"a": [1.0, None, [None, "x"]], "b": {"c": None, "d": None, "e": 3}}


def test_sliding_equals_block_on_one_window(tokenizer):
    text = tokenize(["abc" * 10], tokenizer)
    losses = [
        evaluate(make_gpt2(), text, block_size=64, config=EvaluationConfig(context=context)).loss
        for context in ("block", "sliding")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("context", CONTEXTS)
def test_progress_goes_up_to_all_of_the_text(tokenizer, context):
    told = []
    text = tokenize(["a text of some tokens", "and another one"], tokenizer)
    config = EvaluationConfig(context=context, batch_size=1)
    evaluate(make_gpt2(), text, block_size=8, config=config, progress=lambda *numbers: told.append(numbers))
    assert len(told) > 3
    assert told == sorted(set(told))
    assert told[-1] == (len(text.tokens), len(text.tokens))


def test_model_keeps_its_mode(tokenizer):
    model = make_gpt2().train()
    evaluate(model, tokenize(["abc"], tokenizer), block_size=8)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"context": "all"}, "block, sliding, stream"),
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
    with pytest.raises(FastWeightsError, match="second token"):
        evaluate(make_gpt2(), tokenize(["", ""], tokenizer), block_size=4)
