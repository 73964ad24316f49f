import contextlib
import os
import stat

import pytest

from fastweights import FastWeightsError, load_model
from fastweights.embedded import byte_tokenizer
from fastweights.files import (
    check_output_file,
    check_output_folder,
    only_run,
    only_writer,
    save_model,
    write_text,
    written_whole,
)
from tests.conftest import make_gpt2


class Killed(BaseException):
    """As when the process ends there."""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "book"
    file.write_text("old")
    with contextlib.suppress(Killed), written_whole(file) as partial:
        partial.write_text("half")
        raise Killed
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["book"]


def test_a_full_disk_is_one_line(tmp_path):
    full = "x" * 2**16

    def write() -> None:
        with written_whole(tmp_path / "x") as partial:
            os.symlink("/dev/full", partial)
            partial.write_text(full)

    with pytest.raises(FastWeightsError, match=r"no space left.*as it was"):
        write()
    assert not os.listdir(tmp_path)


def test_files_have_the_mode_that_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "text")
        save_model(make_gpt2(), byte_tokenizer(), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x", *(tmp_path / "model").iterdir())}
    assert modes == {0o640}


@pytest.mark.parametrize("killed_at", range(12))
def test_a_model_killed_at_any_rename_is_old_or_new(tmp_path, killed_at):
    """Never a config with the weights of another, and never none."""
    folder = tmp_path / "model"
    save_model(make_gpt2(n_layer=1), byte_tokenizer(), folder)
    process = os.fork()
    if not process:
        calls, replace = 0, os.replace

        def killed(*arguments):
            nonlocal calls
            calls += 1
            if calls > killed_at:
                os._exit(9)
            replace(*arguments)

        os.replace = killed
        save_model(make_gpt2(n_layer=2), byte_tokenizer(), folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert load_model(folder).config.n_layer == (2 if status == 0 else 1)
    with only_run(folder):
        assert not list(folder.glob(".fastweights-partial-*"))


def test_a_disk_that_is_full_leaves_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_model(make_gpt2(n_layer=1), byte_tokenizer(), folder)
    new = make_gpt2(n_layer=2)
    monkeypatch.setattr(
        new, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(FastWeightsError, match="no space left"):
        save_model(new, byte_tokenizer(), folder)
    assert load_model(folder).config.n_layer == 1
    assert os.listdir(tmp_path) == ["model"]


def test_a_tokenizer_may_have_a_folder_of_templates(tmp_path):
    tokenizer, folder = byte_tokenizer(), tmp_path / "model"
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}  # type: ignore[assignment]
    for layers in (1, 2):
        save_model(make_gpt2(n_layer=layers), tokenizer, folder)
        assert stat.S_IMODE((folder / "additional_chat_templates").stat().st_mode) & stat.S_IXUSR
        assert load_model(folder).config.num_hidden_layers == layers
    save_model(make_gpt2(), byte_tokenizer(), folder)
    assert not (folder / "additional_chat_templates").exists()


def test_a_model_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_model(make_gpt2(n_layer=1), byte_tokenizer(), folder)
    replace, calls = os.replace, []

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == 7:
            raise OSError(5, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(FastWeightsError, match="cannot save the model"):
        save_model(make_gpt2(n_layer=2), byte_tokenizer(), folder)
    assert load_model(folder).config.num_hidden_layers == 1


def test_what_is_not_the_model_stays_where_a_model_is_replaced(tmp_path):
    mine = ("book.safetensors", "tokenizer-notes.md", "vocab.csv", "model-of-the-world.txt")
    for name in mine:
        (tmp_path / name).write_text("mine")
    for layers in (1, 2):
        save_model(make_gpt2(n_layer=layers), byte_tokenizer(), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


def test_nothing_is_overwritten_unasked(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    folder.mkdir()
    refused = {
        "exists": (file, False, ()),
        "folder": (folder, True, ()),
        "plain file": (os.devnull, True, ()),
        "is read": (file, True, [file]),
        "lies in": (folder / "x", True, [folder]),
    }
    for words, (path, overwrite, inputs) in refused.items():
        with pytest.raises(FastWeightsError, match=words):
            check_output_file(type(file)(path), overwrite=overwrite, inputs=inputs, advice="elsewhere")
    check_output_file(file, overwrite=True, advice="elsewhere")
    check_output_folder(folder, overwrite=False)
    (folder / "results.json").touch()
    check_output_folder(folder, overwrite=False, names=["evaluation.png"])
    check_output_folder(folder, overwrite=True)
    for names in (None, ["results.json"]):
        with pytest.raises(FastWeightsError, match=r"has results\.json"):
            check_output_folder(folder, overwrite=False, names=names)


def test_one_writer_to_a_file(tmp_path):
    file = tmp_path / "memory"
    with only_writer(file), pytest.raises(FastWeightsError, match="another process"), only_writer(file):
        pass
    with only_writer(file), only_writer(tmp_path / "another"):
        pass
    assert not os.listdir(tmp_path)


def test_one_run_to_a_folder(tmp_path):
    with only_run(tmp_path), pytest.raises(FastWeightsError, match="another process"), only_run(tmp_path):
        pass
    with only_run(tmp_path):
        check_output_folder(tmp_path, overwrite=False)


def test_what_a_kill_left_is_cleared_by_the_next_run_alone(tmp_path):
    left = tmp_path / ".fastweights-partial-x"
    left.mkdir()
    (left / "new").touch()
    check_output_folder(tmp_path, overwrite=False)
    with only_run(tmp_path):
        assert not left.exists()
        with pytest.raises(FastWeightsError), only_run(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("os.mkdir", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FastWeightsError, match="no space left"), only_run(tmp_path / "new"):
        pass
