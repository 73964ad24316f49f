"""The test of recall asks what it says that it asks."""

import math

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation import recall as module
from fastweights.evaluation.parts import without_fast_weights
from fastweights.evaluation.recall import VALUES, _Document, _documents, _score, _summary, recall
from fastweights.models import add_fast_weight_layer, convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import RecallConfig
from tests.conftest import make_gpt2, make_llama


def test_a_document_says_a_value_and_asks_for_it_so_many_tokens_later(tokenizer):
    config = RecallConfig(repeats=3)
    documents = _documents(tokenizer, 100, config)
    assert [document.right for document in documents] == [*range(len(VALUES))] * 3
    assert len({document.context[4] for document in documents}) == 1
    for document in documents:
        text, value = tokenizer.decode(document.context), VALUES[document.right]
        first, *others, last = text.split("\n")
        assert first.endswith(f" is {value}.")
        assert last == first.removesuffix(f"{value}.")
        assert not any(name in line for line in others for name in VALUES)
        assert [tokenizer.decode(answer) for answer in document.answers] == [f"{name}.\n" for name in VALUES]
        assert len(document.context) - len(last) == 100
    assert _documents(tokenizer, 100, config) == documents
    assert _documents(tokenizer, 100, RecallConfig(repeats=3, seed=1)) != documents


def test_a_model_that_sees_so_far_and_no_farther(tokenizer, monkeypatch):
    """It knows a value if that is among the last 100 tokens that it sees."""

    def score(model, document):
        seen = tokenizer.decode(document.context[-99:])
        return torch.tensor([float(name in seen) * 50 for name in VALUES])

    monkeypatch.setattr(module, "_score", score)
    far = RecallConfig(distances=(60, 70, 80, 300), repeats=1)
    results = recall(make_llama(), tokenizer, far)
    assert [(result.distance, result.documents) for result in results] == [(d, 10) for d in far.distances]
    assert [result.accuracy for result in results] == [1, 1, 1, 0]  # a tie is not the likeliest
    assert [result.rank for result in results] == [1, 1, 1, 5.5]
    assert results[0].loss < 1e-6
    assert results[3].loss == pytest.approx(math.log(10))


MODELS = {
    "softmax": make_gpt2,
    "rotary softmax": make_llama,
    "pure": lambda: convert(make_gpt2(), ConversionConfig(positions="drop")),
    "hybrid": lambda: convert(make_llama(), ConversionConfig(window=8)),
    "fast weight layer": lambda: add_fast_weight_layer(make_gpt2()),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", list(MODELS))
def test_scores_are_those_of_one_pass_over_context_and_answer(kind, monkeypatch):
    model = MODELS[kind]().eval()
    if model.config.model_type == "fastweights" and model.fast_weight_layer is not None:
        model.fast_weight_layer.output_scale.normal_()
    monkeypatch.setattr(module, "_PIECE", 16)
    document = _Document([*range(1, 41)], [[5, 6, 7], [8], [9, 10]], 0)
    for answer, score in zip(document.answers, _score(model, document), strict=True):
        ids = torch.tensor([document.context + answer])
        logits = model(input_ids=ids, use_cache=False).logits[0, 39:-1].log_softmax(-1)
        expected = logits.gather(1, ids[0, 40:, None]).sum()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


def test_a_window_alone_is_at_chance_beyond_its_reach(tokenizer):
    """Whatever it prefers: this model has its preferences."""
    base = make_llama(max_position_embeddings=512)
    model = convert(base, ConversionConfig(window=8)).train()
    config = RecallConfig(distances=(40, 64), repeats=2)
    with without_fast_weights(model):
        for result in recall(model, tokenizer, config):
            assert result.accuracy == 0.1
            assert result.rank == pytest.approx(5.5)
            assert result.loss > 2.4
    assert model.training
    assert any(result.rank != pytest.approx(5.5) for result in recall(model, tokenizer, config))


def test_summary():
    scores = torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, -2.0]])
    result = _summary(7, scores, torch.tensor([0, 2]))
    share = [math.exp(-x) / (1 + math.exp(-1) + math.exp(-2)) for x in (0, 2)]
    assert (result.distance, result.documents, result.accuracy, result.rank) == (7, 2, 0.5, 2)
    assert result.loss == pytest.approx(-sum(map(math.log, share)) / 2)


def test_absolute_positions_end_the_test(tokenizer):
    told = []
    config = RecallConfig(distances=(64, 128), repeats=1)
    results = recall(make_gpt2(), tokenizer, config, progress=lambda *numbers: told.append(numbers))
    assert [result.distance for result in results] == [64]
    assert told == sorted(told)
    assert len(told) == 10
    assert told[-1][0] == told[-1][1] > 640


@pytest.mark.parametrize("arguments", [{"distances": ()}, {"distances": (0,)}, {"repeats": 0}, {"seed": -1}])
def test_bad_settings(arguments):
    with pytest.raises(FastWeightsError, match=next(iter(arguments))):
        RecallConfig(**arguments)


def test_a_distance_shorter_than_a_sentence_is_refused(tokenizer):
    with pytest.raises(FastWeightsError, match="a distance of recall is 8 and a sentence has 30 tokens here"):
        recall(make_llama(), tokenizer, RecallConfig(distances=(8,)))


def test_a_trained_model_recalls(shared_data):
    folder = shared_data / "models" / "stories15M"
    config = RecallConfig(distances=(32, 128), repeats=1)
    for result in recall(load_model(folder), load_tokenizer(str(folder)), config):
        assert result.accuracy > 0.4  # chance is 0.1
