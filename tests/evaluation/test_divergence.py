"""How far a model is from the one that it was made of."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastweights.data import TokenizedText
from fastweights.errors import DivergedError, FastWeightsError
from fastweights.evaluation.divergence import Divergence, divergence
from fastweights.evaluation.perplexity import evaluate
from fastweights.layers.distributions import token_divergences
from fastweights.models.quantisation import quantise
from fastweights.settings.evaluation import EvaluationConfig
from tests.conftest import make_gpt2, make_llama, random_ids
from tests.evaluation.test_parts import make_hybrid

LENGTHS = [50, 31, 1, 58]


def text_of(lengths: list[int]) -> TokenizedText:
    return TokenizedText(random_ids(1, sum(lengths))[0], lengths, lengths, lengths)


def expected(model, original, pieces: list[list[int]], firsts: set[int]) -> tuple[float, float]:
    """By the definition, of pieces that are read from their own beginning."""
    tokens, found, same = text_of(LENGTHS).tokens, [], []
    for piece in pieces:
        q, p = (m(input_ids=tokens[None, piece[:-1]]).logits[0].double().softmax(-1) for m in (model, original))
        counted = torch.tensor([place not in firsts for place in piece[1:]])
        found.append((p * (p / q).log()).sum(-1)[counted])
        same.append((p.argmax(-1) == q.argmax(-1))[counted])
    return torch.cat(found).mean().item(), torch.cat(same).double().mean().item()


@torch.no_grad()
@pytest.mark.parametrize("context", ["block", "stream"])
def test_it_is_what_its_definition_says(context):
    original, text = make_llama(), text_of(LENGTHS)
    model = make_hybrid(original, window=4)
    starts = [0, 50, 81, 82, 140]
    if context == "block":
        pieces = [list(range(start, min(start + 33, 140))) for start in range(0, 139, 32)]
    else:
        pieces = [list(range(*span)) for span in pairwise(starts) if span[1] - span[0] > 1]
    size = 32 if context == "block" else 64
    config = EvaluationConfig(context=context, batch_size=3)
    found = divergence(model, original, text, block_size=size, config=config)
    mean, same = expected(model, original, pieces, set(starts))
    assert 0 < found.divergence == pytest.approx(mean, rel=1e-4)
    assert 1 > found.same_likeliest == pytest.approx(same)
    assert found.tokens == evaluate(model, text, block_size=size, config=config).tokens == 140 - 4
    assert [(x.start, x.stop, x.tokens) for x in found.by_position] == [(0, 128, 136)]
    assert found.median > 0


def test_a_model_is_not_far_from_itself_and_rounding_takes_it_away():
    model, text = make_llama(), text_of([300])
    config = EvaluationConfig(context="sliding", stride=16, max_tokens=290)
    itself = divergence(model, model, text, block_size=64, config=config)
    assert itself == Divergence(0.0, 0.0, 1.0, 289, itself.by_position)
    assert [x.divergence for x in itself.by_position] == [0, 0]
    rounded = divergence(quantise(make_llama(), "int8"), model, text, block_size=64)
    assert 0 < rounded.divergence < 0.01
    assert rounded.same_likeliest > 0.8


def test_parts_of_all_tokens_add_up():
    """A few rows are made distributions of at once."""
    q, p = torch.randn(2100, 1000), torch.randn(2100, 1000)
    found = token_divergences(q, p)
    assert found.shape == (2100,)
    truth = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, truth)


def test_bad_input_is_one_line():
    model, text = make_llama(), text_of([300])
    other = make_llama()
    other.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(FastWeightsError, match="chooses between 257 tokens and its original between 300"):
        divergence(model, other, text, block_size=64)
    with pytest.raises(FastWeightsError, match="absolute positions end at"):
        divergence(model, make_gpt2(), text, block_size=4096)
    with pytest.raises(FastWeightsError, match="no document has a second token"):
        divergence(model, model, text_of([1] * 9), block_size=64)
    broken = make_llama()
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(DivergedError, match="not finite"):
        divergence(broken, model, text, block_size=64)
    assert model.training == make_llama().training
