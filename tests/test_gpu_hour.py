"""`make gpu` in small: everything runs, is kept, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmarks import gpu, gpu_hour
from benchmarks import training as training_step
from benchmarks.kernels import delta_inputs, fault

from tests.cli.test_cli import parsed
from tests.forks import MODELS, Forks

ROOT = Path(__file__).parents[1]
TRITON = ROOT / ".venv" / "triton"


# What the parts import takes longer than what they do in small: they are forks of a process that has.
PRELOAD = "import benchmarks.gpu, benchmarks.gpu_hour, pytest, tests.forks, triton.language, peft; " + MODELS
REHEARSAL = """
import subprocess
from types import SimpleNamespace
from benchmarks import gpu_hour
from tests.forks import Part
gpu_hour.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Part})
gpu_hour.main()
"""


@pytest.fixture
def rehearse(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(TRITON), os.environ.get("PYTHONPATH", "")])
    with Forks(PRELOAD, PYTHONPATH=paths, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") as forks:
        given = ["--device", "cpu", "--output", tmp_path, "--data", tmp_path / "nothing"]
        yield lambda *options: forks.run(*given, *options, code=REHEARSAL)


@pytest.mark.skipif(not TRITON.exists(), reason="Triton is not installed: make test puts it into .venv/triton")
def test_the_rehearsal_runs_every_part_and_then_has_nothing_to_do(tmp_path, rehearse):
    done = rehearse("--minutes", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())
    trained = ("smollm2", "stories15m")
    for name in ("benchmark", "samples", *trained, "smollm2-64"):
        assert parts[name]["done"], done.stdout + (tmp_path / f"{name}.log").read_text()[-2000:]
    assert parts["kernels"]["passed"]
    assert parts["layers"]["passed"]
    assert {path.name for path in (tmp_path / "smollm2").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    judged = json.loads((tmp_path / "smollm2-64" / "results.json").read_text())
    assert len(judged["models"][str(tmp_path / "smollm2")]) == 5
    timed = {row["what"] for row in gpu.read_csv(tmp_path / "kernels.csv")}
    assert {"softmax, flash", "decay, both gates", "gated delta", "delta"} <= timed
    assert (tmp_path / "kernels.png").stat().st_size

    again = rehearse("--minutes", "1")
    assert again.returncode == 0
    assert " -m " not in again.stdout  # no command was run


def hour(tmp_path, minutes=1.0) -> gpu_hour.Hour:
    return gpu_hour.Hour(minutes, "cpu", tmp_path / "data", tmp_path)


def test_each_training_on_a_gpu_is_a_command_that_there_is(tmp_path):
    stories = tmp_path / "data" / "stories15M"
    stories.mkdir(parents=True)
    (stories / "config.json").touch()
    (tmp_path / "data" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    there = gpu_hour.Hour(1, "cuda", tmp_path / "data", tmp_path)
    trainings = [training for beside in gpu_hour._trainings(there) for training in beside]
    windows = [f"windows-{name}" for name in ("128", "128-average", "128-values", "128-alone", "64", "64-alone")]
    assert [training.name for training in trainings] == ["smollm2", *windows, "stories15m", "embedded", "layer"]
    for training in trainings:
        tokens = gpu_hour._command(training, tmp_path / training.name, dict.fromkeys(training.stages, 100))[3:]
        recipe = None
        if tokens[0] == "--config":
            recipe, tokens = ROOT / tokens[1], tokens[2:]
        config = parsed(*tokens, recipe=recipe)["config"]
        assert config.output == tmp_path / training.name
        assert config.run.compile
        for stage in training.stages:
            assert getattr(config, stage).steps == 100
        if training.stages == ("finetune",):
            assert config.finetune.fast_weights is not training.name.endswith("-alone")


def test_a_part_that_takes_too_long_is_stopped_and_may_write_its_checkpoint(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('KEPT', 'w').close(), sys.exit(3)))\n"
        "time.sleep(60)"
    ).replace("KEPT", str(tmp_path / "kept"))
    assert not hour(tmp_path).run("part", [sys.executable, "-c", program], 3)
    assert (tmp_path / "kept").exists()


def test_without_time_nothing_begins(tmp_path, capsys):
    assert not hour(tmp_path, minutes=0.1).run("part", [sys.executable, "-c", "raise SystemExit(1)"], 60)
    assert "no time left" in capsys.readouterr().out


def test_a_part_that_fails_says_where_to_look(tmp_path, capsys):
    assert not hour(tmp_path).run("part", [sys.executable, "-c", "print('why'); raise SystemExit(1)"], 60)
    assert "part: failed with exit code 1" in capsys.readouterr().out
    assert (tmp_path / "part.log").read_text() == "why\n"


def test_what_is_known_of_a_part_is_on_disk_whole(tmp_path):
    first = hour(tmp_path)
    first.note("layer", steps={"meta": 3})
    first.note("layer", done=False)
    assert json.loads(first.file.read_text()) == {"layer": {"steps": {"meta": 3}, "done": False}}


def test_a_missing_model_is_left_out_with_a_line(tmp_path, capsys):
    there = gpu_hour.Hour(1, "cuda", tmp_path, tmp_path)
    assert gpu_hour._stories(there) is None
    assert "stories15m: left out: no folder stories15M in" in capsys.readouterr().out


def test_texts_are_those_that_are_there(tmp_path):
    gpu_hour._texts(hour(tmp_path), tmp_path / "texts")
    assert {path.name for path in (tmp_path / "texts").iterdir()} == {
        "python.train.txt",
        "b.validation.txt",
        "c.test.txt",
    }
    assert gpu_hour._repeats(hour(tmp_path), tmp_path / "repeated")
    plain, again = (tmp_path / "texts", tmp_path / "repeated")
    assert (again / "c.test.txt").read_text() == (plain / "c.test.txt").read_text()
    longer = [len((folder / "python.train.txt").read_text()) for folder in (again, plain)]
    assert longer[0] > 1.1 * longer[1]


def test_no_gpu_is_one_line(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "benchmarks.gpu_hour", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "benchmarks.gpu_hour: there is no GPU here that torch can use; --device cpu rehearses in small\n"
    )


def test_a_kill_reaches_all_that_runs(tmp_path):
    """Each part may write its checkpoint, and none goes on."""
    kept = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); time.sleep(60)"
    there = hour(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(there.run, name, [sys.executable, "-c", kept], 50) for name in ("one", "other")]
        while len(there.running) < 2:
            time.sleep(0.1)
        time.sleep(0.5)  # until they listen
        with pytest.raises(SystemExit):
            there.stop()
    assert [part.result() for part in parts] == [False, False]
    assert not there.running


def _row(what: str, T: int, mode: str = "forward") -> dict:
    return {
        **gpu._row(mode, what, (1, T, 1, 16), {"p50": 2.0}, 1.0, (1e6, 1e9), dict.fromkeys(gpu.CEILINGS, 3.0), gpu.ALL),
        "p20_ms": 1.5,
        "p80_ms": 2.5,
    }


def test_a_benchmark_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    output, measured = tmp_path / "kernels.csv", []

    def groups(device, limits, delta):
        for T in (8, 16):
            yield (1, T, 1, 16, False, gpu.ALL), lambda T=T: measured.append((T, limits)) or [_row("softmax, flash", T)]
            if len(measured) == 1 and not output.with_suffix(".png").exists():
                raise KeyboardInterrupt

    ceilings = iter([dict.fromkeys(gpu.CEILINGS, 3.0), dict.fromkeys(gpu.CEILINGS, 5.0)])
    for name, stand_in in {
        "check_device": lambda device: None,
        "check": lambda *given: None,
        "fault_of_step": lambda *given: None,
        "check_delta": lambda *given: True,
        "ceilings": lambda device: next(ceilings),
        "show": lambda rows: None,
        "plot": lambda rows, file: file.touch(),
        "gpu_environment": lambda device: {"gpu": "a card", "cuda": "12.10"},
        "_all": groups,
    }.items():
        monkeypatch.setattr(gpu, name, stand_in)
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--output", str(output), "--resume"])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    before = gpu.read_csv(output)
    assert [row["T"] for row in before] == [8]
    output.with_suffix(".png").touch()
    gpu.main()
    assert measured == [(8, dict.fromkeys(gpu.CEILINGS, 3.0)), (16, dict.fromkeys(gpu.CEILINGS, 3.0))]
    after = gpu.read_csv(output)
    assert [row["T"] for row in after] == [8, 16]
    changing = ("date", "load")
    assert {k: v for k, v in after[0].items() if k not in changing} == {
        k: v for k, v in before[0].items() if k not in changing
    }

    monkeypatch.setattr(gpu, "gpu_environment", lambda device: {"gpu": "another card"})
    gpu.main()  # whose figures are not the other's
    assert [row["gpu"] for row in gpu.read_csv(output)] == ["another card"] * 2
    assert measured[-1] == (16, dict.fromkeys(gpu.CEILINGS, 5.0))


def test_another_library_that_fails_leaves_ours_timed(monkeypatch, capsys):
    def broken(name: str = ""):
        raise AttributeError("triton has no such thing")

    monkeypatch.setattr(gpu, "import_module", broken)
    assert gpu._of_fla([], []) == {}
    assert list(gpu._that_run({"softmax, flash": list, "fla, chunk_gla": broken}, "forward")) == ["softmax, flash"]
    assert capsys.readouterr().out.count("left out: ") == 2


def test_a_delta_rule_that_failed_its_tests_is_not_timed(tmp_path, monkeypatch):
    there, commands = hour(tmp_path), []
    monkeypatch.setattr(there, "run", lambda name, command, seconds: commands.append(command) or False)
    for passed in (True, False):
        there.note("delta-kernels", passed=passed)
        gpu_hour._benchmark(there)
    assert ["--no-delta" in command for command in commands] == [False, True]


def test_a_training_step_is_timed_once_by_a_command_that_there_is(tmp_path, monkeypatch):
    there, commands = hour(tmp_path), []
    monkeypatch.setattr(there, "run", lambda name, command, seconds: commands.append(command) or True)
    for passed in (False, True, True):
        there.note("kernels", passed=passed)
        gpu_hour._training_speed(there)
    ((_, _, module, *options),) = commands
    assert module == "benchmarks.training"
    assert training_step.parser().parse_args(options).output == tmp_path / "training.csv"


def test_a_control_waits_for_what_it_is_the_control_of(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(gpu_hour, "_steps", lambda hour, each, seconds: None if each.name == "base" else {"a": 9})
    monkeypatch.setattr(gpu_hour, "_train_one", lambda hour, each, steps, seconds: trained.append((each.name, steps)))
    made = {"command": ["train"], "options": {}, "stages": ("a",), "share": 0.5}
    both = [gpu_hour.Training("base", **made), gpu_hour.Training("alone", **made, control_of="base")]
    gpu_hour._train(hour(tmp_path), both)
    assert not trained
    assert "alone: left out, as base has no steps yet" in capsys.readouterr().out
    there = hour(tmp_path)
    there.note("base", steps={"a": 7}, done=True)
    gpu_hour._train(there, both)
    assert trained == [("alone", {"a": 7})]


def test_rows_that_lack_a_contender_or_a_column_are_shown_and_left(tmp_path, capsys):
    gpu.show([_row("softmax, flash", 8), {**_row("fla, chunk_gla", 8), "comparison": gpu.FLA}])
    ours = {**_row("decay, key gate", 8), "comparison": gpu.FLA}
    gpu.show([_row("softmax, flash", 8), {**_row("fla, chunk_gla", 8), "comparison": gpu.FLA}, ours])
    assert capsys.readouterr().out.count("decay, key gate takes 1.00 of the time of") == 1
    old = _row("softmax, flash", 8)
    del old["comparison"]
    gpu.write_csv(tmp_path / "old.csv", [old], {})
    assert gpu.finished(tmp_path / "old.csv", {}) == []


def test_what_the_rules_must_do_at_the_least():
    assert gpu.work("decay, both gates", "forward", 1, 10, 2, 16) == (2 * 320 * 6, 2 * 10 * 2 * 256 * 2)
    assert gpu.work("gated delta", "forward", 1, 10, 2, 16) == (2 * 320 * (4 + 2 / 16), 2 * 10 * 2 * 256 * 3)
    moved, operations = gpu.work("delta", "forward and backward", 1, 10, 2, 16)
    assert moved == 2 * 320 * (3 * (4 + 1 / 16) - 1)
    assert operations == 2 * 10 * 2 * 256 * 12


def test_a_wrong_backend_is_named_and_a_right_one_is_not(monkeypatch):
    from fastweights import ops

    given = delta_inputs(1, 9, 1, 8)
    for tensors in (given, given[:4]):
        assert fault("chunked", tensors, 1e-5, rule=ops.delta_rule) is None
    right = ops._DELTA_RULE["chunked"]
    monkeypatch.setitem(ops._DELTA_RULE, "chunked", lambda q, k, v, b, *rest: right(q, k, v, 1.01 * b, *rest))
    wrong = fault("chunked", given, 1e-5, rule=ops.delta_rule)
    assert str(wrong).startswith("delta_rule, 'chunked': relative error ")
