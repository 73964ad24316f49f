"""Whatever is typed, and whatever is in the files: one line of error, and no traceback.

A few cases run with the tests; `make fuzz` runs as many as FUZZ_CASES says, ten thousand by default.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastweights.cli import COMMANDS, TRACEBACK, main, make_app
from fastweights.embedded import byte_tokenizer
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2

CASES = int(os.environ.get("FUZZ_CASES", "0"))
SECONDS = 20
"""After which a case is let go: a model may well be asked for much."""

TINY = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
DATA = ("--data.text", "TEXT", "--data.block-size", "16")
FEW = ("--evaluation.max-tokens", "40")
SHAPE = ("--shape.hidden-size", "8", "--shape.layers", "1", "--shape.heads", "2")
STEPS = ("--short.steps", "1", "--long.steps", "1", "--short-block-size", "8")
STAGE = ("--transfer.steps", "1", "--transfer.batch-size", "1", "--finetune.steps", "1", "--finetune.batch-size", "1")
GRID = ("--rules", "add", "--feature-maps", "elu+1", "--seeds", "0")
BASES: dict[str, list[tuple[str, ...]]] = {
    "pretrain": [(*DATA, *SHAPE, *STEPS, "--output", "OUT")],
    "convert": [("GPT2", "OUT"), ("GPT2", "OUT", "--positions", "drop", "--window", "2")],
    "merge": [("GPT2", "OUT"), ("PURE", "OUT", "--base", "GPT2")],
    "train": [
        ("--model", "GPT2", *DATA, *STAGE, *FEW, "--output", "OUT"),
        ("--model", "PURE", "--teacher", "GPT2", *DATA, *STAGE, *FEW, "--output", "RUN", "--resume"),
        ("--model", "PURE", *DATA, "--stage", "meta", "--meta.steps", "1", "--meta.blocks", "1", "--output", "OUT"),
    ],
    "compare": [
        ("--model", "GPT2", *DATA, *STAGE, *FEW, *GRID, "--output", "OUT"),
        ("--model", "GPT2", *DATA, *STAGE, *FEW, *GRID, "--windows", "0", "2", "--output", "OUT"),
    ],
    "eval": [
        ("PURE", "--text", "TEXT", *FEW, "--block-size", "16"),
        ("GPT2", "PURE", "--text", "LINES", *FEW, "--block-size", "16", "--output", "OUT"),
    ],
    "generate": [
        ("PURE", "--prompt", "a", "--max-new-tokens", "3"),
        ("GPT2", "--prompt", "-", "--max-new-tokens", "3"),
        ("PURE", "--memory", "MEMORY", "--max-new-tokens", "3"),
    ],
    "read": [("PURE", "TEXT", "-o", "OUT"), ("PURE", "TEXT", "-o", "OUT", "--memory", "MEMORY")],
    "sample": [("PURE", "OUT.jsonl", "--tokens", "20"), ("GPT2", "OUT.jsonl.gz", "--length", "9", "--tokens", "20")],
    "chat": [("PURE", "--max-new-tokens", "3"), ("GPT2", "--max-new-tokens", "3", "--system", "a")],
    "demo": [("--output", "OUT")],
}
PLACES = ("GPT2", "PURE", "TEXT", "LINES", "MEMORY", "RUN", "OUT")
VALUES = st.one_of(
    st.sampled_from(
        [
            "0",
            "1",
            "2",
            "3",
            "-1",
            "2.5",
            "nan",
            "inf",
            "-inf",
            "1e999",
            "1e-999",
            "true",
            "none",
            "block",
            "stream",
            "rms",
            "drop",
            "wandb",
        ]
    ),
    st.sampled_from(["", " ", "a[/x]", "[v2]", "\x1b[2J", "-", "--", "'", "é", "\udcff"]),
    st.sampled_from(["..", "/dev/null", "x" * 300, "no/such/place", "nosuch", "a/b", "embedded", "stdlib"]),
    st.sampled_from(PLACES),
    st.text(max_size=8).filter(lambda text: not text.startswith("/") and "\0" not in text),  # no place of the system's
)
DAMAGES = ("empty", "cut", "flip", "garbage", "list", "null", "gone", "folder")


def options(command: str) -> list[str]:
    """All that a command takes by name."""
    arguments = make_app(show_all=True)[command].assemble_argument_collection()
    return sorted({name for argument in arguments for name in argument.names if name.startswith("-")})


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """Models, texts, a memory and a run that was begun."""
    folder = tmp_path_factory.mktemp("things")
    base = make_gpt2(**TINY)
    base.save_pretrained(folder / "GPT2")
    convert(base, ConversionConfig(positions="drop")).save_pretrained(folder / "PURE")
    for model in ("GPT2", "PURE"):
        byte_tokenizer().save_pretrained(folder / model)
    (folder / "TEXT").with_suffix(".txt").write_text("One bottle of beer on the wall.\n" * 20)
    (folder / "LINES").with_suffix(".jsonl").write_text('{"text": "One bottle of beer on the wall."}\n' * 20)
    assert call(["read", "PURE", "TEXT", "-o", "MEMORY"], folder, b"", 200)[0] == 0
    train = ["train", *BASES["train"][1]]
    assert call([*train[:-1], "--run.save-every", "1"], folder, b"", 200)[0] == 0
    shutil.rmtree(folder / "RUN" / "finetune")
    return folder


def call(arguments: list[str], folder: Path, standard_input: bytes, seconds: int = SECONDS) -> tuple[int, str]:
    """Exit code and standard error of the command line, with names of PLACES standing for what the folder has."""
    names = {name: str(next(iter(folder.glob(f"{name}.*")), folder / name)) for name in PLACES}
    before = sys.argv, sys.stdin, os.getcwd(), os.environ.get(TRACEBACK)
    errors = io.StringIO()
    sys.argv = ["fastweights", *[names.get(argument, argument) for argument in arguments]]
    sys.stdin = io.TextIOWrapper(io.BytesIO(standard_input), encoding="utf-8")
    os.environ[TRACEBACK] = "1"
    os.chdir(folder)
    old = signal.signal(signal.SIGALRM, _let_go)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main()
        return 0, errors.getvalue()
    except SystemExit as stop:
        return int(stop.code or 0), errors.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        sys.argv, sys.stdin = before[:2]
        os.chdir(before[2])
        os.environ.pop(TRACEBACK)
        if before[3] is not None:
            os.environ[TRACEBACK] = before[3]


def _let_go(*_) -> None:
    raise KeyboardInterrupt


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = list(draw(st.sampled_from(BASES[command])))
    names = options(command)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["add", "replace", "drop", "switch"]))
        if kind == "add":
            arguments += [draw(st.sampled_from(names)), draw(VALUES)]
        elif kind == "switch":
            arguments.append(draw(st.sampled_from(names)))
        elif arguments:
            place = draw(st.integers(0, len(arguments) - 1))
            arguments[place : place + 1] = [draw(VALUES)] if kind == "replace" else []
    return [command, *arguments]


@st.composite
def damages(draw) -> list[tuple[float, str, float]]:
    """Which file (as a share of all), how, and where in it."""
    share = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(share, st.sampled_from(DAMAGES), share), max_size=2))


def damage(folder: Path, which: float, how: str, where: float) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[int(which * len(files))]
    content = file.read_bytes()
    place = int(where * len(content))
    changed = {
        "empty": b"",
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ 1 << int(where * 1000) % 8]) + content[place + 1 :]
        if content
        else b"\0",
        "garbage": bytes(range(256)),
        "list": b"[]",
        "null": b"null",
    }
    file.unlink()
    if how in changed:
        file.write_bytes(changed[how])
    elif how == "folder":
        file.mkdir()


@settings(
    max_examples=CASES or 60,
    deadline=None,
    database=None,
    derandomize=not CASES,
    suppress_health_check=list(HealthCheck),
)
@given(arguments=command_lines(), harm=damages(), standard_input=st.binary(max_size=40))
@pytest.mark.timeout(0 if CASES else 300)
def test_one_line_of_error_and_no_traceback(things, arguments, harm, standard_input):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "things"
        shutil.copytree(things, folder)
        for each in harm:
            damage(folder, *each)
        code, errors = call(arguments, folder, standard_input)
    assert code in (0, 1, 2, 130)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code in (1, 2)), errors


@pytest.fixture(autouse=True)
def _no_demo(monkeypatch):
    """It takes minutes; what is typed is checked before it begins."""
    monkeypatch.setattr("fastweights.cli.demo.train", _stopped)


def _stopped(*_):
    raise KeyboardInterrupt
