"""`fastweights generate`: what it prints, its prompts, its defaults, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import string
import sys

import pytest
import torch
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from fastweights.embedded import byte_tokenizer
from fastweights.files import save_model
from fastweights.models import convert, load_model
from fastweights.models.decoding import Decoder
from fastweights.models.quantisation import quantise
from fastweights.models.rings import GrowingCacheLayer
from fastweights.settings.conversion import ConversionConfig
from tests.cli.test_cli import run
from tests.conftest import FAMILIES, make_llama

FEW = ("--max-new-tokens", 6, "--temperature", 0)


def standard_input(monkeypatch, content: bytes | None) -> None:
    monkeypatch.setattr(sys, "stdin", None if content is None else io.TextIOWrapper(io.BytesIO(content)))


def answers(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_settings_of_a_model_that_ask_for_more_than_tokens_do_no_harm(monkeypatch, capsys, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"return_dict_in_generate": True}))
    code, out, err = run(monkeypatch, capsys, "generate", folder, "--prompt", "a", *FEW)
    assert (code, err) == (0, "")
    assert out.startswith("a")


def test_a_sentencepiece_model_goes_on_with_a_space(monkeypatch, capsys, shared_data, tmp_path):
    """Alone, after a memory, and where the prompt itself ends in odd ways."""
    source = shared_data / "models" / "stories15M"
    code, out, _ = run(monkeypatch, capsys, "generate", source, "--prompt", "Once upon a", *FEW)
    assert (code, out) == (0, "Once upon a time, there was a little\n")
    for prompt in ("  Once\n", "One day,\n\n  a <unk>"):
        _, out, _ = run(monkeypatch, capsys, "generate", source, "--prompt", prompt, *FEW)
        assert out.startswith(prompt)

    converted, memory, text = tmp_path / "converted", tmp_path / "x.memory", tmp_path / "text.txt"
    run(monkeypatch, capsys, "convert", source, converted, "--positions", "drop")
    text.write_text("Once upon a time, there")
    run(monkeypatch, capsys, "read", converted, text, "-o", memory)
    whole = "Once upon a time, there was a girl."
    _, expected, _ = run(monkeypatch, capsys, "generate", converted, "--prompt", whole, *FEW)
    _, found, _ = run(monkeypatch, capsys, "generate", converted, "--memory", memory, "--prompt", whole[23:], *FEW)
    assert whole[:23] + found == expected
    _, expected, _ = run(monkeypatch, capsys, "generate", converted, "--prompt", whole[:23], *FEW)
    _, found, _ = run(monkeypatch, capsys, "generate", converted, "--memory", memory, *FEW)
    assert whole[:23] + found == expected


def test_a_long_prompt_takes_no_more_memory_at_once(monkeypatch, capsys, endless_folder, model_folder, tmp_path):
    """It is read in pieces; that these give what one call gives is tested beside them (tests/reading)."""
    longest = [0]
    call = PreTrainedModel.__call__

    def counted(self, *args, **kwargs):
        if kwargs.get("input_ids") is not None:
            longest[0] = max(longest[0], kwargs["input_ids"].shape[1])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "__call__", counted)
    (tmp_path / "long.txt").write_text("some words " * 1000)
    code, out, _ = run(monkeypatch, capsys, "generate", endless_folder, "--prompt-file", tmp_path / "long.txt", *FEW)
    assert code == 0
    assert out.startswith("some words " * 1000)
    assert longest[0] == 1024
    code, out, err = run(monkeypatch, capsys, "generate", model_folder, "--prompt-file", tmp_path / "long.txt", *FEW)
    assert (code, out) == (1, "")
    assert "the prompt has 11000 tokens" in err


@pytest.mark.parametrize("beams", [1, 2])
def test_models_of_both_kinds_say_what_transformers_says(monkeypatch, capsys, endless_folder, model_folder, beams):
    for folder in (endless_folder, model_folder):
        model, ids = load_model(folder), byte_tokenizer()("def f", return_tensors="pt")["input_ids"]
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, num_beams=beams
        )
        arguments = ("--prompt", "def f", "--json", "--beams", beams, *FEW)
        code, out, _ = run(monkeypatch, capsys, "generate", folder, *arguments)
        assert code == 0
        (answer,) = answers(out)
        assert answer["text"] == byte_tokenizer().decode(whole[0, 5:], skip_special_tokens=True)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "opt"])
def test_softmax_models_take_our_steps(monkeypatch, capsys, tmp_path, family, weights):
    """Those that have them; a Mistral of windows alone is of constant memory then, and an OPT may have norms after."""
    changes = {"mistral": {"sliding_window": 5}, "opt": {"do_layer_norm_before": False}}
    model = FAMILIES[family](**changes.get(family, {}))
    save_model(model, byte_tokenizer(), tmp_path / "model")
    ids = byte_tokenizer()("def f", return_tensors="pt")["input_ids"]
    plain = load_model(tmp_path / "model", weights=weights)
    whole = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    arguments = ("generate", tmp_path / "model", "--prompt", "def f", "--json", "--weights", weights, *FEW)
    made, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *given: made.append(1) or step(*given))
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert answers(out)[0]["text"] == byte_tokenizer().decode(whole[0, 5:], skip_special_tokens=True)
    assert len(made) == (0 if family == "opt" else 6)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_softmax_in_eight_bits(monkeypatch, capsys, tmp_path, weights):
    save_model(make_llama(), byte_tokenizer(), tmp_path / "model")
    given = "generate", tmp_path / "model", "--prompt", "def f", "--json", "--weights", weights, *FEW
    kept, growing = [], GrowingCacheLayer.__init__
    monkeypatch.setattr(GrowingCacheLayer, "__init__", lambda layer: kept.append(layer) or growing(layer))
    assert run(monkeypatch, capsys, *given)[0] == 0
    assert not kept
    code, out, _ = run(monkeypatch, capsys, *given, "--softmax-dtype", "int8")
    assert (code, len(kept)) == (0, 3)
    assert {layer.get_seq_length() for layer in kept} == {4 + 6}
    model = quantise(convert(make_llama(), ConversionConfig(layers="none", softmax_dtype="int8")).eval(), weights)
    ids = byte_tokenizer()("def f", return_tensors="pt")["input_ids"]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert answers(out)[0]["text"] == byte_tokenizer().decode(whole[0, 5:], skip_special_tokens=True)


def test_softmax_in_eight_bits_is_for_models_that_have_some_in_a_cache_of_ours(
    monkeypatch, capsys, endless_folder, tmp_path
):
    save_model(FAMILIES["opt"](do_layer_norm_before=False), byte_tokenizer(), tmp_path / "model")
    for folder, expected in (
        (endless_folder, "no layer keeps its softmax attention"),
        (tmp_path / "model", "goes through transformers' modules"),
    ):
        code, out, err = run(monkeypatch, capsys, "generate", folder, "--softmax-dtype", "int8", *FEW)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert expected in err


def test_bare_generate_says_something(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "generate")
    assert code == 0
    assert out.startswith("def ")
    assert len(set(out)) > 10
    assert len(set(out.split())) > 5


def test_prompts(monkeypatch, capsys, model_folder, tmp_path):
    """Files, lines, standard input; each prompt is answered as if it were alone."""
    few = ("--max-new-tokens", 4, "--json")
    alone = {}
    for prompt in ("one", "two", "three\n"):
        _, out, _ = run(monkeypatch, capsys, "generate", model_folder, "--prompt", prompt, *few)
        alone[prompt] = answers(out)[0]["text"]
        (tmp_path / prompt.strip()).write_text(prompt)
    files = ("--prompt-file", tmp_path / "three", "--prompt-file", tmp_path / "one")
    _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *files, *few)
    assert [(answer["prompt"], answer["text"]) for answer in answers(out)] == [
        ("three\n", alone["three\n"]),
        ("one", alone["one"]),
    ]
    for arguments, given in ((("--prompt", "one\ntwo"), None), (("--prompt", "-"), b"one\r\ntwo\r\n")):
        standard_input(monkeypatch, given)
        _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *arguments, "--lines", *few)
        assert [(answer["prompt"], answer["text"]) for answer in answers(out)] == [
            ("one", alone["one"]),
            ("two", alone["two"]),
        ]


def test_why_it_stops(monkeypatch, capsys, model_folder):
    greedy = ("--prompt", "a", "--temperature", 0, "--json")
    _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *greedy, "--max-new-tokens", 9)
    (whole,) = answers(out)
    assert (whole["tokens"], whole["stop"]) == (9, "length")
    assert whole["seconds"] > 0
    assert len(whole["text"]) > 4
    stop = whole["text"][2:4]
    before = whole["text"][: whole["text"].index(stop)]
    for beams in (1, 2):
        arguments = (*greedy, "--max-new-tokens", 9, "--stop", "never", "--stop", stop, "--beams", beams)
        _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *arguments)
        (answer,) = answers(out)
        assert stop not in answer["text"]
        if beams == 1:
            assert (answer["text"], answer["stop"]) == (before, "stop")
            assert answer["tokens"] < 9


def test_it_stops_at_the_end(monkeypatch, capsys, tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = [5, 0]  # the likeliest of equals is the first
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _, out, _ = run(monkeypatch, capsys, "generate", tmp_path, "--prompt", "a", "--temperature", 0, "--json")
    (answer,) = answers(out)
    assert (answer["tokens"], answer["stop"]) == (1, "end")


def test_a_repetition_penalty_is_for_what_was_generated(monkeypatch, capsys, endless_folder, model_folder):
    for folder in (endless_folder, model_folder):
        model, ids = load_model(folder), byte_tokenizer()(string.printable, return_tensors="pt")["input_ids"]
        few = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        penalty = RepetitionPenaltyLogitsProcessor(9.0, prompt_ignore_length=100)
        of_new, of_all = (
            byte_tokenizer().decode(model.generate(ids, **few, **more)[0, 100:])
            for more in ({"logits_processor": [penalty]}, {"repetition_penalty": 9.0})
        )
        arguments = ("--prompt", string.printable, "--max-new-tokens", 8, "--temperature", 0, "--json")
        _, out, _ = run(monkeypatch, capsys, "generate", folder, *arguments, "--repetition-penalty", 9)
        assert answers(out)[0]["text"] == of_new != of_all


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_predicts_nothing_is_one_line(monkeypatch, capsys, tmp_path, temperature):
    model = make_llama()
    model.model.norm.weight.fill_(3e38)  # finite, and all that comes of it is not
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    arguments = ("--prompt", "a", "--temperature", temperature)
    code, out, err = run(monkeypatch, capsys, "generate", tmp_path, *arguments)
    assert (code, out) == (1, "a\n")
    assert err.count("\n") == 1
    assert "not finite" in err


def test_a_terminal_is_told_nothing_by_a_text(monkeypatch, capsys, model_folder):
    prompt = ("--prompt", "\x1b[31m", "--max-new-tokens", "1")
    _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *prompt)
    assert out.startswith("\x1b[31m")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run(monkeypatch, capsys, "generate", model_folder, *prompt)
    assert out.startswith(r"\x1b[31m")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--prompt", "a", "--prompt-file", "b"), "give one of the two"),
        (("--lines",), "no prompts given"),
        (("--stop", ""), "a stop text is empty"),
        (("--temperature", "0", "--top-p", "0.5"), "top_p says what to sample from"),
        (("--beams", "2", "--top-k", "5"), "top_k says what to sample from"),
        (("--top-p", "0"), "top_p 0.0"),
        (("--repetition-penalty", "inf"), "repetition_penalty inf"),
        (("--prompt-file", "nowhere"), "nowhere does not exist"),
        (("--prompt", "-"), "standard input is closed"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, capsys, arguments, expected):
    standard_input(monkeypatch, None)
    code, out, err = run(monkeypatch, capsys, "generate", *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert expected in err


def test_an_empty_standard_input_is_one_line(monkeypatch, capsys, model_folder):
    for more in ((), ("--lines",)):
        standard_input(monkeypatch, b"")
        code, _, err = run(monkeypatch, capsys, "generate", model_folder, "--prompt", "-", *more)
        assert code == 1
        assert "standard input is empty" in err


def test_a_line_that_is_refused_does_not_end_the_others(monkeypatch, capsys, model_folder, tmp_path):
    (tmp_path / "lines").write_text("a\n" + "b" * 200 + "\nc\n")  # beyond the model's 128 positions
    arguments = ("--prompt-file", tmp_path / "lines", "--lines", "--json", *FEW)
    code, out, err = run(monkeypatch, capsys, "generate", model_folder, *arguments)
    assert code == 1
    assert ["error" in answer for answer in answers(out)] == [False, True, False]
    assert re.search(r"^line 2: the prompt has 200 tokens", err, re.M)
    assert "error: 1 of 3 prompts were refused" in err


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_weights_in_few_bits(monkeypatch, capsys, tmp_path, weights):
    converted, text, memory = tmp_path / "converted", tmp_path / "x.txt", tmp_path / "x.memory"
    run(monkeypatch, capsys, "convert", "embedded", converted, "--window", 8, "--positions", "drop")
    text.write_text("def f(x):\n    return")
    asked = ("--weights", weights)
    code, out, err = run(monkeypatch, capsys, "generate", converted, "--prompt", "def ", *FEW, *asked)
    assert (code, err) == (0, "")
    assert out.startswith("def ")
    assert run(monkeypatch, capsys, "read", converted, text, "-o", memory, *asked)[0] == 0
    assert run(monkeypatch, capsys, "generate", converted, "--memory", memory, *FEW, *asked)[0] == 0
    code, _, err = run(monkeypatch, capsys, "generate", converted, "--memory", memory, *FEW)
    assert code == 1
    assert "made by another model" in err


def test_weights_of_no_known_kind(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "generate", "--weights", "int3")
    assert code == 2
    assert "int3" in err
    assert "int4" in err
