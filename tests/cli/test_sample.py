"""`fastweights sample`: a file that is whole at any time, and the same whether sampling was stopped or not."""

from __future__ import annotations

import gzip
import json
import os
import signal

import pytest
import torch

from fastweights.cli.commands import sample as command
from fastweights.data import load_documents
from fastweights.models.loading import load_model
from fastweights.reading import sampling
from fastweights.reading.sampled_text import SampledText
from fastweights.settings.text import DataConfig
from tests.cli.test_cli import run

FEW = ("--tokens", "600", "--length", "20", "--batch-size", "8")


def rows(path) -> list[dict]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_what_was_sampled_can_be_trained_on(monkeypatch, capsys, model_folder, tmp_path, name):
    code, out, err = run(monkeypatch, capsys, "sample", model_folder, tmp_path / name, *FEW)
    assert (code, err) == (0, "")
    found = rows(tmp_path / name)
    total = sum(row["tokens"] for row in found)
    assert 600 <= total < 600 + 8 * 20
    assert f"{len(found)} documents, {total} tokens, " in out
    assert "% have the very tokens that were sampled" in out
    texts = [row["text"] for row in found if row["text"] and not row["text"].isspace()]
    assert load_documents(DataConfig(text=str(tmp_path / name))) == texts


def stop_after(patch, steps: int, number: int) -> None:
    draw, count = sampling.draw, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), number)
        return draw(*args)

    patch.setattr(sampling, "draw", counted)


@pytest.mark.parametrize("save_seconds", [0, 60])
@pytest.mark.parametrize(("steps", "number"), [(5, signal.SIGINT), (47, signal.SIGTERM)])
def test_a_stop_keeps_whole_batches_and_resuming_ends_in_the_same_file(
    monkeypatch, capsys, model_folder, tmp_path, steps, number, save_seconds
):
    whole, output = tmp_path / "whole.jsonl.gz", tmp_path / "s.jsonl.gz"
    assert run(monkeypatch, capsys, "sample", model_folder, whole, *FEW)[0] == 0
    monkeypatch.setattr(command, "_SAVE_SECONDS", save_seconds)
    with monkeypatch.context() as patch:
        stop_after(patch, steps, number)
        code, out, err = run(patch, capsys, "sample", model_folder, output, *FEW)
    assert (code, out) == (128 + number, "")
    assert err.count("\n") == 1
    assert "go on with the same command and --resume" in err
    if steps > 20:
        kept = rows(output)
        assert kept
        assert kept == rows(whole)[: len(kept)]
    assert run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--resume")[0] == 0
    assert output.read_bytes() == whole.read_bytes()
    code, out, _ = run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--resume")
    assert code == 0
    assert "a second" not in out
    assert output.read_bytes() == whole.read_bytes()


def test_more_tokens_may_be_asked_for(monkeypatch, capsys, model_folder, tmp_path):
    more = ("--tokens", "1200", *FEW[2:])
    run(monkeypatch, capsys, "sample", model_folder, tmp_path / "at once.jsonl", *more)
    run(monkeypatch, capsys, "sample", model_folder, tmp_path / "s.jsonl", *FEW)
    run(monkeypatch, capsys, "sample", model_folder, tmp_path / "s.jsonl", *more, "--resume")
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "at once.jsonl").read_bytes()


def test_it_saves_on_the_way(monkeypatch, capsys, model_folder, tmp_path):
    sizes, save = [], SampledText.save

    def noted(self):
        save(self)
        sizes.append(len(rows(self.path)))

    monkeypatch.setattr(SampledText, "save", noted)
    monkeypatch.setattr(command, "_SAVE_SECONDS", 0)
    run(monkeypatch, capsys, "sample", model_folder, tmp_path / "s.jsonl.gz", *FEW)
    assert sizes[:3] == [8, 16, 24]


def test_lines_of_prompts_begin_documents(monkeypatch, capsys, model_folder, tmp_path):
    (tmp_path / "prompts").write_text("One\n\nTwo\n")
    prompts = ("--prompt-file", tmp_path / "prompts")
    assert run(monkeypatch, capsys, "sample", model_folder, tmp_path / "s.jsonl", *FEW, *prompts)[0] == 0
    starts = [row["text"][:3] for row in rows(tmp_path / "s.jsonl")]
    assert starts == ["One", "Two"] * (len(starts) // 2)


def test_precision_is_that_of_the_model(monkeypatch, capsys, model_folder, tmp_path):
    dtypes = []

    def noted(*args, **kwargs):
        model = load_model(*args, **kwargs)
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr("fastweights.models.loading.load_model", noted)
    for precision in ("fp32", "bf16"):
        output = tmp_path / f"{precision}.jsonl"
        assert run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--precision", precision)[0] == 0
    assert dtypes == [torch.float32, torch.bfloat16]


def test_nothing_is_overwritten_or_mixed_unasked(monkeypatch, capsys, model_folder, tmp_path):
    output = tmp_path / "s.jsonl"
    output.write_text("mine\n")
    for arguments, said in (((), "exists"), (("--resume",), "is no whole file of sampled text")):
        code, _, err = run(monkeypatch, capsys, "sample", model_folder, output, *FEW, *arguments)
        assert code == 1
        assert err.count("\n") == 1
        assert said in err
        assert output.read_text() == "mine\n"
    assert run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--overwrite")[0] == 0
    before = output.read_bytes()
    code, _, err = run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--seed", "1", "--resume")
    assert code == 1
    assert "with other settings" in err
    assert output.read_bytes() == before
    output.write_bytes(before[:-9])
    code, _, err = run(monkeypatch, capsys, "sample", model_folder, output, *FEW, "--resume")
    assert code == 1
    assert "is no whole file" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s.txt",), "another suffix than .jsonl or .jsonl.gz"),
        (("s.jsonl", "--resume", "--overwrite"), "give one of them"),
        (("s.jsonl", "--tokens", "0"), "tokens is 0"),
        (("s.jsonl", "--length", "1000"), "absolute positions end at 128"),
        (("s.jsonl", "--prompt-file", "nowhere"), "nowhere does not exist"),
        (("s.jsonl", "--prompt-file", "empty lines"), "all lines of prompt_file are empty"),
        (("prompts.jsonl", "--prompt-file", "prompts.jsonl", "--overwrite"), "which is read"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, capsys, model_folder, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("a\n")
    (tmp_path / "empty lines").write_text("\n\n")
    code, out, err = run(monkeypatch, capsys, "sample", model_folder, *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "s.jsonl").exists()
