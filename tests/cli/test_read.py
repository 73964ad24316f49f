"""`fastweights read`: several texts, saves on the way, stops, and nothing that is lost."""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import shlex
import signal
import sys
import threading

import pytest
import torch

from fastweights import progress
from fastweights.data import tokenize
from fastweights.embedded import byte_tokenizer
from fastweights.models import convert, load_model
from fastweights.reading.memory import Memory, load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from tests.cli.test_cli import run
from tests.conftest import make_llama


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", math.inf)


@pytest.fixture
def texts(tmp_path):
    """Two files, and what they hold."""
    documents = ["".join(f"line {i} of the first.\n" for i in range(2000)), "the second\n" * 200]
    files = [tmp_path / "first.txt", tmp_path / "second.txt.gz"]
    files[0].write_text(documents[0])
    files[1].write_bytes(gzip.compress(documents[1].encode()))
    return files, documents


def same(model, memory: Memory, other: Memory) -> bool:
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    told = [m.generate(torch.tensor([97]), **arguments).tolist() for m in (memory, other)]
    return told[0] == told[1] and memory.tokens == other.tokens and memory.last_token == other.last_token


def expected(model, documents) -> Memory:
    tokens = tokenize(documents, byte_tokenizer()).tokens[:-1]  # the last document has no end yet
    return new_memory(model).read([tokens])


@pytest.fixture(params=[[], [3, 7]], ids=["", "start tokens"])
def start_tokens(request, monkeypatch):
    """Those that a tokenizer puts before each text."""
    monkeypatch.setattr("fastweights.data.first_tokens", lambda tokenizer: request.param)


def test_several_texts_are_documents_of_one_memory(monkeypatch, capsys, endless_folder, texts, tmp_path, start_tokens):
    files, documents = texts
    code, _, err = run(monkeypatch, capsys, "read", endless_folder, *files, "-o", tmp_path / "m")
    assert (code, err) == (0, "")
    model = load_model(endless_folder)
    assert same(model, load_memory(model, tmp_path / "m"), expected(model, documents))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(documents[0].encode())))
    code, _, _ = run(monkeypatch, capsys, "read", endless_folder, "-", files[1], "-o", tmp_path / "n")
    assert code == 0
    assert same(model, load_memory(model, tmp_path / "n"), expected(model, documents))


def test_a_pipe_has_a_name_as_well(monkeypatch, capsys, endless_folder, texts, tmp_path):
    """As a shell gives one: fastweights read MODEL <(some command)"""
    files, documents = texts
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(documents[0],))
    writer.start()
    code, _, err = run(monkeypatch, capsys, "read", endless_folder, tmp_path / "pipe", files[1], "-o", tmp_path / "m")
    writer.join()
    assert (code, err) == (0, "")
    model = load_model(endless_folder)
    assert same(model, load_memory(model, tmp_path / "m"), expected(model, documents))


def stop_after(monkeypatch, pieces: int, number: int, *, within: bool = True) -> None:
    """Send this process a signal in the middle of the piece after so many, or while it waits for that."""
    from fastweights.reading import text

    read, tokens, count = Memory.read, text.tokens_in_pieces, [0]

    def counted(self, *args, **kwargs):
        count[0] += 1
        if within and count[0] == pieces + 1:
            os.kill(os.getpid(), number)
        return read(self, *args, **kwargs)

    def waiting(*args, **kwargs):
        for i, piece in enumerate(tokens(*args, **kwargs)):
            if not within and i == pieces:
                os.kill(os.getpid(), number)
            yield piece

    monkeypatch.setattr(Memory, "read", counted)
    monkeypatch.setattr(text, "tokens_in_pieces", waiting)


@pytest.mark.parametrize(
    ("pieces", "number", "within"),
    [
        (2, signal.SIGINT, True),
        (3, signal.SIGINT, False),
        (1, signal.SIGTERM, True),
        (0, signal.SIGTERM, False),
        (7, signal.SIGTERM, True),  # the end token between the two, and what the second begins with
        (9, signal.SIGINT, True),  # all
    ],
)
def test_what_was_read_before_a_stop_is_saved_and_gone_on_from(
    monkeypatch, capsys, endless_folder, texts, tmp_path, pieces, number, within, start_tokens
):
    files, documents = texts
    output = tmp_path / "my memory"
    with monkeypatch.context() as patch:
        stop_after(patch, pieces, number, within=within)
        code, out, err = run(patch, capsys, "read", endless_folder, *files, "-o", output)
    assert (code, out) == (128 + number, "")
    assert err.count("\n") == 1
    command = err.partition("go on with fastweights ")[2]
    code, _, _ = run(monkeypatch, capsys, *shlex.split(command))
    assert code == 0
    model = load_model(endless_folder)
    assert same(model, load_memory(model, output), expected(model, documents))


def test_of_a_pipe_that_was_stopped_the_memory_alone_is_left(monkeypatch, capsys, endless_folder, texts, tmp_path):
    (_, file), documents = texts
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(documents[0],))
    writer.start()
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        code, _, err = run(patch, capsys, "read", endless_folder, tmp_path / "pipe", file, "-o", tmp_path / "m")
    writer.join()
    assert (code, err.count("\n")) == (128 + signal.SIGINT, 1)
    assert "go on with" not in err
    assert f"can be read with --memory {tmp_path / 'm'}" in err
    model = load_model(endless_folder)
    read = int(re.search(r"up to character (\d+)", err)[1])
    assert same(model, load_memory(model, tmp_path / "m"), expected(model, [documents[0][:read]]))


def test_a_pipe_that_comes_later_is_not_gone_on_with(monkeypatch, capsys, endless_folder, texts, tmp_path):
    (file, _), _ = texts
    os.mkfifo(tmp_path / "pipe")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        _, _, err = run(
            patch, capsys, "read", endless_folder, file, tmp_path / "pipe", "-o", tmp_path / "m", "--weights", "bf16"
        )
    assert f"can be read with --memory {tmp_path / 'm'} --weights bf16" in err


def test_it_saves_on_the_way(monkeypatch, capsys, endless_folder, texts, tmp_path):
    files, _ = texts
    tokens, save = [], Memory.save

    def noted(self, path):
        tokens.append(self.tokens)
        return save(self, path)

    monkeypatch.setattr(Memory, "save", noted)
    run(monkeypatch, capsys, "read", endless_folder, *files, "-o", tmp_path / "m", "--save-minutes", "1e-9")
    assert len(tokens) == 10
    assert tokens == sorted(tokens)
    tokens.clear()
    run(monkeypatch, capsys, "read", endless_folder, *files, "-o", tmp_path / "n")
    assert len(tokens) == 1


@torch.no_grad()
def test_a_model_that_ceases_to_predict_keeps_the_last_good_save(monkeypatch, capsys, texts, tmp_path):
    monkeypatch.setattr("fastweights.models.loading._check_finite", lambda *_: None)
    model = convert(make_llama(), ConversionConfig(positions="drop"))
    model.get_input_embeddings().weight[ord("Z")] = math.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    _, documents = texts
    (tmp_path / "bad.txt").write_text(documents[0] + "Z" + documents[0])
    arguments = (tmp_path / "model", tmp_path / "bad.txt", "-o", tmp_path / "m", "--save-minutes", "1e-9")
    code, _, err = run(monkeypatch, capsys, "read", *arguments)
    assert code == 1
    assert err.count("\n") == 1
    assert "not finite" in err
    assert 0 < load_memory(load_model(tmp_path / "model"), tmp_path / "m").tokens < len(documents[0]) + 1


def test_what_comes_before_an_error_is_kept(monkeypatch, capsys, endless_folder, tmp_path):
    text = "".join(f"{i} bottles of beer.\n" for i in range(3000))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(text.encode())[:-100])
    code, _, err = run(monkeypatch, capsys, "read", endless_folder, tmp_path / "cut.txt.gz", "-o", tmp_path / "m")
    assert code == 1
    assert err.count("\n") == 1
    assert "remembers what came before" in err
    assert 8000 < load_memory(load_model(endless_folder), tmp_path / "m").tokens < len(text)


def test_nothing_is_overwritten_unasked(monkeypatch, capsys, endless_folder, texts, tmp_path):
    files, _ = texts
    first = files[0].read_text()
    (tmp_path / "there").write_text("mine")
    outputs = {
        tmp_path / "there": "exists",
        files[0]: "which is read",
        endless_folder / "model.safetensors": "which is read",
    }
    for output, said in outputs.items():
        overwrite = () if said == "exists" else ("--overwrite",)
        code, _, err = run(monkeypatch, capsys, "read", endless_folder, files[0], "-o", output, *overwrite)
        assert code == 1
        assert said in err
    assert (tmp_path / "there").read_text() == "mine"
    assert files[0].read_text() == first
    memory = tmp_path / "m"
    for more in ((), ("--memory", memory, "--overwrite")):
        code, _, _ = run(monkeypatch, capsys, "read", endless_folder, files[0], "-o", memory, *more)
        assert code == 0
    model = load_model(endless_folder)
    assert load_memory(model, memory).tokens == 2 * len(first)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--skip", "-1"), "skip is -1"),
        (("--skip", "99999999"), "are to be skipped"),
        (("--save-minutes", "nan"), "save_minutes nan"),
        (("cut.xz",), "cut.xz is not whole UTF-8 text"),
        (("-",), "standard input is closed"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, capsys, endless_folder, texts, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "cut.xz").write_bytes(b"\xfd7zXZ\x00\x00")
    code, _, err = run(monkeypatch, capsys, "read", endless_folder, texts[0][0], *arguments, "-o", "m")
    assert code == 1
    assert err.count("\n") == 1
    assert expected in err
