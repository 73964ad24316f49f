"""`fastweights convert` replaces nothing unasked, and nothing by half."""

from __future__ import annotations

import errno
import os

import pytest

from fastweights.files import only_run
from fastweights.models import FastWeightsForCausalLM, load_model
from fastweights.models.decoding import why_plain
from tests.cli.test_cli import run


@pytest.fixture
def convert(monkeypatch, capsys, model_folder, tmp_path):
    return lambda *options: run(monkeypatch, capsys, "convert", model_folder, tmp_path / "converted", *options)


@pytest.fixture
def converted(convert, tmp_path):
    code, _, _ = convert()
    assert code == 0
    return tmp_path / "converted"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_replaced_only_when_asked(convert, converted):
    before = files(converted)
    code, _, err = convert("--window", "8")
    assert (code, files(converted)) == (1, before)
    assert "replace what is there with --overwrite" in err
    code, _, _ = convert("--window", "8", "--overwrite")
    assert (code, load_model(converted).config.settings.window) == (0, 8)


def test_a_full_disk_leaves_the_old_model_whole(convert, converted, monkeypatch):
    before = files(converted)

    def full(model, folder):
        (folder / "config.json").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FastWeightsForCausalLM, "save_pretrained", full)
    code, _, err = convert("--window", "8", "--overwrite")
    assert (code, files(converted)) == (1, before)
    assert len(err.splitlines()) == 1
    assert "no space left" in err


def test_two_do_not_write_to_one_folder(convert, tmp_path):
    with only_run(tmp_path / "converted"):
        code, _, err = convert()
    assert code == 1
    assert "another process is writing" in err


def test_the_model_itself_stays(monkeypatch, capsys, model_folder):
    for output in (model_folder, model_folder.parent):
        code, _, err = run(monkeypatch, capsys, "convert", model_folder, output, "--overwrite")
        assert code == 1
        assert "stays as it is" in err


def test_no_layer_is_converted(convert, tmp_path):
    """As whoever wants this library's steps of decoding for softmax attention does."""
    code, out, _ = convert("--layers", "none")
    assert code == 0
    model = load_model(tmp_path / "converted")
    assert set(model.config.layer_types) == {"full_attention"}
    assert why_plain(model) is None
    assert f"next: fastweights generate {tmp_path / 'converted'}" in " ".join(out.split())


def test_layers_are_chosen_by_a_text(convert, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 60, encoding="utf-8")
    options = ("--data.text", tmp_path / "text.txt", "--data.block-size", "64")
    code, out, _ = convert("--window", "8", "--layers", "auto:1", *options)
    assert code == 0
    types = load_model(tmp_path / "converted").config.layer_types
    assert sorted(types) == ["full_attention", *["hybrid_sliding"] * (len(types) - 1)]
    rows = [line for line in out.splitlines() if "full_attention" in line or "hybrid_sliding" in line]
    assert [row.split("│")[-2].strip().split(",")[0] for row in rows] == types
    code, _, err = convert("--window", "8", "--overwrite", *options)
    assert (code, err.strip()) == (1, "error: data was given, which only layers auto:N read: leave it out")
