"""`fastweights compare`: a table, a file and a picture, and one line for whatever is wrong."""

import json
import os
import signal

import pytest

from fastweights.errors import FastWeightsError
from fastweights.settings.grid import GridConfig
from fastweights.training.trainer import StageTrainer
from tests.cli.test_cli import run

FEW = ("--data.block-size", "32", "--transfer.steps", "2", "--finetune.steps", "2", "--evaluation.max-tokens", "200")
FEW += ("--evaluation.parts-tokens", "100")
TWO_BY_TWO = ("--rules", "decay", "add", "--feature-maps", "identity", "elu+1")


@pytest.fixture
def command(model_folder, text_file, tmp_path):
    return ("compare", "--model", model_folder, "--data.text", text_file, "--output", tmp_path / "grid", *FEW)


def test_table_file_and_picture(monkeypatch, capsys, command, tmp_path):
    grid = ("--rules", "decay", "add", "--feature-maps", "elu+1", "--windows", "0", "16", "--seeds", "0", "1")
    code, out, err = run(monkeypatch, capsys, *command, *grid)
    assert code == 0
    assert "8 of 8: rule add, map elu+1, window 16, seed 1" in err
    for head in ("retention", "tokens/s", "window alone", "fast weights alone", "untrained window"):
        assert head in out
    data = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert (len(data["cells"]), len(data["ranking"])) == (8, 4)
    rows = [line.split() for line in out.splitlines() if " decay " in line or " add " in line]
    rows = [[word for word in row if word != "│"] for row in rows]
    for row, expected in zip(rows, data["ranking"], strict=True):
        assert row[:4] == [expected["rule"], expected["feature_map"], str(expected["window"] or "-"), "2"]
        assert row[4] == f"{expected['loss']:.4f}"
        assert row[6:9] == [f"{expected['retention']:.3f}", "±", f"{expected['retention_spread']:.3f}"]
        parts = [expected["parts"][name] for name in expected["parts"] if name != "teacher"]
        assert row[11:] == ([f"{part:.3f}" for part in parts] or ["-"] * 4)
    assert (tmp_path / "grid" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_without_windows_there_are_no_parts(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, *command, "--rules", "add", "--feature-maps", "elu+1", "--seeds", "0")
    assert code == 0
    assert "window alone" not in out
    assert "±" not in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rules", "decay", "sum"), "rules 'sum' is unknown; known are decay, add"),
        (("--feature-maps", "elu"), "feature_maps 'elu' is unknown; known are identity"),
        (("--seeds", "1", "2", "1"), "seeds has 1 twice"),
        (("--rules", "add", "add"), "rules has add twice"),
        (("--windows", "0", "1"), "windows has 1; allowed are 0"),
        (("--windows", "2.5"), "no whole number"),
        (("--seeds", "-1"), "seed is -1"),
        (("--run.seed", "3"), "run.seed was given, but seeds says which"),
        (("--convert.rule", "add"), "--convert.rule"),
        (("--finetune.lora-rank", "2"), "give both the same"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--convert.normaliser", "--rules", "delta"), "nothing is left to compare: rule delta has no normaliser"),
        (("--held-out", "train"), "held_out is train, which is trained on"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_whatever_is_wrong_is_one_line(monkeypatch, capsys, command, tmp_path, options, expected):
    code, _, err = run(monkeypatch, capsys, *command, *options)
    assert code in (1, 2)  # ours, or of the parser
    assert err.splitlines()[-1].startswith("error: ")
    assert expected in err.splitlines()[-1]
    assert not (tmp_path / "grid").exists()


def test_empty_lists_are_refused(monkeypatch, capsys, command, tmp_path):
    for name in ("rules", "feature_maps", "windows", "seeds"):
        (tmp_path / "recipe.toml").write_text(f"{name} = []")
        code, _, err = run(monkeypatch, capsys, "--config", tmp_path / "recipe.toml", *command)
        assert code in (1, 2)  # ours, or of the parser
        assert err.splitlines()[-1].startswith("error: ")
        with pytest.raises(FastWeightsError, match=f"{name} is empty: name at least one"):
            GridConfig(**{name: ()})


def test_a_folder_in_use_is_refused(monkeypatch, capsys, command, tmp_path):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "book.txt").write_text("mine")
    for options in ((), ("--resume",)):
        code, _, err = run(monkeypatch, capsys, *command, *options)
        assert code == 1
        assert "has book.txt in it" in err
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["book.txt"]


def test_ctrl_c_is_one_line_and_loses_no_step(monkeypatch, capsys, command, tmp_path):
    step, steps = StageTrainer.training_step, [0]

    def noted(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 5:  # the first of the second cell
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", noted)
    monkeypatch.setattr("fastweights.training.trainer.logger.warning", lambda line, *values: print(line % values))
    grid = ("--rules", "add", "--feature-maps", "identity", "elu+1", "--seeds", "0")
    code, out, _ = run(monkeypatch, capsys, *command, *grid)
    assert code == 130
    assert out == "stopped by SIGINT at step 1; a checkpoint was written, --resume goes on from it\n"
    assert len(json.loads((tmp_path / "grid" / "comparison.json").read_text())["cells"]) == 1
    code, out, _ = run(monkeypatch, capsys, *command, *grid, "--resume")
    assert (code, steps[0]) == (0, 8)
    assert "elu+1" in out
