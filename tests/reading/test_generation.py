"""Going on: prompts in pieces, text as it comes, stop texts, models that predict nothing."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from fastweights.errors import FastWeightsError
from fastweights.models import convert
from fastweights.reading.generation import Continuation, FiniteLogits, go_on, read_prompt
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import random_ids

ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("converted", [False, True])
def test_a_prompt_in_pieces_is_gone_on_from_alike(family, converted, beams, monkeypatch):
    model = convert(family, ConversionConfig(window=8)).eval() if converted else family
    model.generation_config.use_cache = False  # a model that came out of transformers' Trainer may say so
    ids = random_ids(1, 50)[0]
    at_once = model.generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), num_beams=beams, use_cache=True, **ARGUMENTS
    )
    monkeypatch.setattr("fastweights.reading.generation.PIECE", 8)
    read = []
    cache = read_prompt(model, ids, progress=read.append)
    assert read == [8, 16, 24, 32, 40, 48, 49]
    assert go_on(model, ids, cache, num_beams=beams, **ARGUMENTS).tolist() == at_once[0, 50:].tolist()


def told(tokenizer, before, ids, **arguments) -> tuple[str, list[str], bool]:
    parts: list[str] = []
    continuation = Continuation(tokenizer, before, write=parts.append, **arguments)
    continuation.put(torch.tensor([before]))
    for i in ids:
        continuation.put(torch.tensor([i]))
        if continuation(torch.tensor([[i]]), None).all():
            break
    continuation.end()
    return continuation.text, parts, continuation.stopped


@pytest.mark.parametrize("name", ["models/stories15M", "tokenizers/gpt2"])
def test_text_that_is_told_is_the_text(shared_data, name):
    """Spaces at its beginning, after new lines, and characters of several tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    text = "Once upon a time\n  there was a  «naïve» 漢字 🙂 girl.\n Lily"
    ids = tokenizer(text)["input_ids"]
    for n in range(1, len(ids)):
        before = tokenizer.decode(ids[:n], skip_special_tokens=True)
        if "\ufffd" not in before:
            rest, parts, _ = told(tokenizer, ids[:n], ids[n:])
            assert before + rest == text
            assert "".join(parts) == rest
            assert not any("\ufffd" in part for part in parts)


def test_characters_come_whole_and_bytes_that_are_none_come_too(tokenizer):
    ids = list("漢é".encode())
    assert told(tokenizer, [97], ids)[1] == ["漢", "é", ""]
    assert told(tokenizer, [97], [0xFF] * 9)[0] == "\ufffd" * 9
    assert told(tokenizer, [97], ids[:2])[0] == "\ufffd"


def test_the_end_token_is_no_text(tokenizer):
    assert told(tokenizer, [97], [98, 256])[0] == "b"


def test_special_tokens_leave_a_character_whole(tokenizer):
    assert told(tokenizer, [97], [256, 256, 256, *"🙂".encode()])[0] == "🙂"


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        ((), "one END two", False),
        (("END",), "one ", True),
        (("two", " END"), "one", True),
        (("two!",), "one END two", False),
        (("NEVER", "e"), "on", True),
        (("one END two",), "", True),
    ],
)
def test_stop_texts(tokenizer, stop, expected, stopped):
    """Each token is a byte, so all of these span several."""
    text, parts, has_stopped = told(tokenizer, [97], list(b"one END two"), stop=stop)
    assert (text, has_stopped) == (expected, stopped)
    assert "".join(parts) == text
    at_once = Continuation(tokenizer, [97], stop=stop)
    at_once.add(list(b"one END two"))
    at_once.end()
    assert (at_once.text, at_once.stopped) == (expected, stopped)


@torch.no_grad()
@pytest.mark.parametrize("sample", [False, True])
def test_a_model_that_predicts_nothing_is_refused(base, sample):
    base.get_output_embeddings().weight[3] = math.nan
    ids = random_ids(1, 5)[0]
    arguments = {**ARGUMENTS, "do_sample": sample, "logits_processor": [FiniteLogits()]}
    with pytest.raises(FastWeightsError, match="logits are not finite"):
        go_on(base, ids, read_prompt(base, ids), **arguments)


def test_tokens_that_are_forbidden_are_no_fault():
    scores = torch.tensor([[0.0, -math.inf]])
    assert FiniteLogits()(torch.tensor([[1]]), scores).equal(scores)
    with pytest.raises(FastWeightsError, match="not finite"):
        FiniteLogits()(torch.tensor([[1]]), torch.full((1, 2), -math.inf))
