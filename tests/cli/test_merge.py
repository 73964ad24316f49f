"""`fastweights merge`: an adapter and its base as one model, and every command takes the adapter itself."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastweights.embedded import byte_tokenizer
from fastweights.models import convert, load_model
from fastweights.models.adapters import save_adapter
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from tests.cli.test_cli import run
from tests.conftest import make_llama, random_ids


@pytest.fixture
def adapter(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = convert(tmp_path / "base", ConversionConfig(window=8))
    for attention in model.fast_attentions():
        torch.nn.init.constant_(attention.fast_scale, 0.25)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    return tmp_path / "adapter"


@torch.no_grad()
def test_the_merged_model_needs_neither(monkeypatch, capsys, tmp_path, adapter):
    expected = load_model(adapter)(random_ids(1, 20)).logits
    output = tmp_path / "merged"
    code, out, _ = run(monkeypatch, capsys, "merge", adapter, output)
    assert (code, f"fastweights generate {output}" in out) == (0, True)
    shutil.rmtree(adapter)
    shutil.rmtree(tmp_path / "base")
    assert load_model(output)(random_ids(1, 20)).logits.equal(expected)
    assert load_tokenizer(output).get_vocab() == byte_tokenizer().get_vocab()


def test_it_may_have_longer_windows(monkeypatch, capsys, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = convert(tmp_path / "base", ConversionConfig(window=8, wide_window=16, layers="0,2"))
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    given = "merge", tmp_path / "adapter", tmp_path / "merged", "--window", 12, "--wide-window", 24
    assert run(monkeypatch, capsys, *given, "--window-dtype", "int8", "--state-dtype", "int8")[0] == 0
    config = load_model(tmp_path / "merged").config
    assert config.windows == [12, 24, 12]
    assert config.windows_in_eight_bits
    assert config.states_in_eight_bits


def test_its_base_may_be_named(monkeypatch, capsys, tmp_path, adapter):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    code, _, err = run(monkeypatch, capsys, "merge", adapter, tmp_path / "merged")
    assert (code, "is not to be had" in err) == (1, True)
    code, _, _ = run(monkeypatch, capsys, "merge", adapter, tmp_path / "merged", "--base", tmp_path / "moved")
    assert code == 0
    load_model(tmp_path / "merged")


def test_nothing_is_lost(monkeypatch, capsys, tmp_path, adapter, model_folder):
    for output in (adapter, tmp_path):
        code, _, err = run(monkeypatch, capsys, "merge", adapter, output, "--overwrite")
        assert (code, "stays as it is" in err) == (1, True)
    code, _, err = run(
        monkeypatch, capsys, "merge", adapter, tmp_path / "base", "--base", tmp_path / "base", "--overwrite"
    )
    assert (code, "stays as it is" in err) == (1, True)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    code, _, err = run(monkeypatch, capsys, "merge", adapter, tmp_path / "merged")
    assert (code, "--overwrite" in err) == (1, True)
    code, _, err = run(monkeypatch, capsys, "merge", model_folder, tmp_path / "other")
    assert (code, "is no adapter with fast weights" in err) == (1, True)
    load_model(adapter)


def test_commands_take_an_adapter(monkeypatch, capsys, tmp_path, adapter, text_file):
    code, _, err = run(monkeypatch, capsys, "generate", adapter, "--prompt", "a", "--max-new-tokens", "3")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "read", adapter, text_file, "-o", tmp_path / "memory")
    assert code == 0, err
    code, _, err = run(
        monkeypatch, capsys, "generate", adapter, "--memory", tmp_path / "memory", "--max-new-tokens", "3"
    )
    assert code == 0, err
    parts = ("--parts", "--evaluation.max-tokens", "64", "--block-size", "32")
    code, out, err = run(monkeypatch, capsys, "eval", adapter, "--text", text_file, *parts)
    assert code == 0, err
    assert "teacher" in out
