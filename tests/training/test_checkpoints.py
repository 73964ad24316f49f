"""A run goes on only from what is whole, and says what it passed over."""

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from fastweights.errors import FastWeightsError
from fastweights.settings.training import RunConfig
from fastweights.training.checkpoints import (
    FINISHED,
    MANIFEST,
    checkpoint_to_resume,
    clear,
    damage,
    drop_others,
    last_checkpoint,
    seal,
)
from fastweights.training.runs import seconds_trained, tokens_seen
from tests.training.test_trainer import trainer


class Killed(BaseException):
    """As when the process ends there."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A stage of six steps with checkpoints after the fourth and the sixth."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, steps=6).run(resume=False)
    return folder


@pytest.fixture
def stage(trained, tmp_path):
    """The same, killed before it had saved its model."""
    for checkpoint in trained.glob("checkpoint-*"):
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    return tmp_path


def last_seconds(stage):
    """Of training, by its last checkpoint."""
    return json.loads((last_checkpoint(stage) / "trainer_state.json").read_text())["log_history"][-1]["seconds"]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json", "config.json")


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
@pytest.mark.parametrize("harm", [cut, flip, os.remove])
def test_a_damaged_checkpoint_is_passed_over_with_one_line(stage, caplog, file, harm):
    assert last_checkpoint(stage) == checkpoint_to_resume(stage) == stage / "checkpoint-6"
    assert not caplog.messages
    harm(stage / "checkpoint-6" / file)
    assert checkpoint_to_resume(stage) == stage / "checkpoint-4"
    (line,) = caplog.messages
    assert "checkpoint-6 is passed over" in line
    assert "going on from checkpoint-4" in line
    assert file in line or file == MANIFEST


def test_a_run_that_falls_back_ends_as_one_that_was_not_disturbed(trained, stage):
    cut(stage / "checkpoint-6" / "optimizer.pt")
    trainer(stage, steps=6).run(resume=True)
    assert (stage / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert damage(stage / "checkpoint-6") is None


def test_without_a_whole_checkpoint_there_is_one_line(stage, caplog):
    for checkpoint in stage.iterdir():
        cut(checkpoint / "optimizer.pt")
    with pytest.raises(FastWeightsError, match=r"checkpoint-6.*'optimizer.pt' is not what was written.*--overwrite"):
        trainer(stage, steps=6).run(resume=True)
    # What never was whole takes nothing away.
    for checkpoint in stage.iterdir():
        (checkpoint / MANIFEST).unlink()
    assert checkpoint_to_resume(stage) is None
    assert all("cut off while it was written" in line for line in caplog.messages)
    assert last_checkpoint(stage / "nothing") is None


def test_a_finished_stage_whose_model_is_damaged_is_saved_again(trained, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(trained, folder)
    assert damage(folder, FINISHED) is None
    cut(folder / "model.safetensors")
    assert damage(folder, FINISHED) == "'model.safetensors' is not what was written"
    trainer(folder, steps=6).run(resume=True)
    assert damage(folder, FINISHED) is None
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not (folder / "checkpoint-7").exists()  # no step was taken
    assert (tokens_seen(folder), seconds_trained(folder)) == (tokens_seen(trained), last_seconds(trained))
    cut(folder / "model.safetensors")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(FastWeightsError, match=r"damaged: 'model.safetensors'.*no whole checkpoint"):
        checkpoint_to_resume(folder)


def test_of_a_stage_that_was_stopped_after_its_last_step_nothing_is_trained_again(trained, tmp_path):
    """Without an entry in its loss history, too."""
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}))
    seal(tmp_path / "checkpoint-6", (tmp_path / "checkpoint-6").iterdir())
    trainer(tmp_path, steps=6, schedule="constant_with_warmup").run(resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert tokens_seen(tmp_path) == tokens_seen(trained)
    assert seconds_trained(tmp_path) >= 0


def test_how_often_to_save_and_to_log_may_change(trained, tmp_path):
    for checkpoint in trained.glob("checkpoint-*"):
        if checkpoint.name == "checkpoint-4":
            shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    trainer(tmp_path, steps=9, run=RunConfig(save_every=3, log_every=2)).run(resume=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 6, 8]


def test_older_checkpoints_stay_until_the_new_one_is_whole(tmp_path, monkeypatch):
    def killed(folder, *args):
        if folder.name == "checkpoint-6":
            raise Killed
        seal(folder, *args)

    monkeypatch.setattr("fastweights.training.trainer.seal", killed)
    with pytest.raises(Killed):
        trainer(tmp_path, steps=6).run(resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_only_sealed_checkpoints_before_the_newest_are_kept(tmp_path):
    for number in (1, 2, 3, 5, 9):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "x").write_text("x")
        if number != 3:
            seal(folder, folder.iterdir())
    drop_others(tmp_path / "checkpoint-5")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-5"}


def test_a_copy_under_another_name_is_left_alone(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-kept-1", "checkpoint-kept-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)
        seal(tmp_path / name, [tmp_path / name / "model"])
    drop_others(tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-kept-1", "checkpoint-kept-4"]


def test_a_pickle_that_would_run_code_is_one_line(stage):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(stage / "harm"),)

    checkpoint = stage / "checkpoint-4"
    shutil.rmtree(stage / "checkpoint-6")
    for harm in (lambda file: torch.save(Harm(), file), lambda file: file.write_bytes(pickle.dumps(Harm(), 2))):
        for name in ("optimizer.pt", "rng_state.pth"):
            whole = (checkpoint / name).read_bytes()
            harm(checkpoint / name)
            seal(checkpoint, checkpoint.iterdir())
            with pytest.raises(FastWeightsError, match=r"cannot go on from .*checkpoint-4"):
                trainer(stage, steps=6).run(resume=True)
            (checkpoint / name).write_bytes(whole)
    assert not (stage / "harm").exists()


@pytest.mark.parametrize(
    "call",
    ["torch.save", "transformers.PreTrainedModel.save_pretrained", "fastweights.training.checkpoints.write_text"],
)
def test_a_write_that_fails_is_one_line_and_leaves_what_was_whole(tmp_path, monkeypatch, call):
    stage = trainer(tmp_path, steps=6)
    compute = stage.compute_loss

    def filled(*args, **kwargs):
        if stage.state.global_step == 2:
            monkeypatch.setattr(call, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return compute(*args, **kwargs)

    stage.compute_loss = filled
    with pytest.raises(FastWeightsError, match=r"checkpoint-4: no space left.*last good .*checkpoint-2"):
        stage.run(resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    assert damage(tmp_path / "checkpoint-2") is None


def test_a_disk_that_is_really_full(trained, tmp_path):
    """As root, on a file system with room for one and a half checkpoints."""
    size = 3 * sum(file.stat().st_size for file in (trained / "checkpoint-6").iterdir()) // 2
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(FastWeightsError, match=r"cannot write .*; the last good checkpoint is .*checkpoint-2") as e:
            trainer(tmp_path, steps=6).run(resume=False)
        assert "\n" not in str(e.value)
        assert "full disk" in str(e.value) or "no space left" in str(e.value)
        assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_checkpoints_by_the_clock(tmp_path):
    trainer(tmp_path, steps=4, run=RunConfig(save_every=100, save_minutes=1e-9)).run(resume=False)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_only_what_a_run_goes_on_from_is_cleared(tmp_path):
    kept = [tmp_path / "transfer" / "model.safetensors", tmp_path / "other" / "finished", tmp_path / "checkpoint-1"]
    gone = [tmp_path / "transfer" / "finished", tmp_path / "transfer" / "checkpoint-2"]
    for path in (*kept, *gone):
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if "checkpoint" in path.name else path.touch()
    clear(tmp_path / "transfer")
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
