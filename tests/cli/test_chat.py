"""`fastweights chat`: turns from a pipe and a terminal, its commands, and what it refuses."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

from fastweights.cli.commands.chat import _typed
from fastweights.embedded import byte_tokenizer
from fastweights.models import load_model
from fastweights.reading.conversation import Conversation
from fastweights.reading.memory import load_memory
from tests.cli.test_cli import run

FEW = ("--max-new-tokens", 6, "--temperature", 0)
PLAIN = "has no chat template: the model goes on with each line as text\n"


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run it on lines that come through a pipe: exit code, output, errors."""

    def chatted(model, *lines: str, more=FEW) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode())))
        return run(monkeypatch, capsys, "chat", model, *more)

    return chatted


def answers(folder, *turns: str, system: str | None = None) -> list[str]:
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None}
    conversation = Conversation(load_model(folder), byte_tokenizer(), settings, system=system)
    said = []
    for turn in turns:
        conversation.read(turn)
        said.append(conversation.answer())
    return said


def test_each_line_of_a_pipe_is_a_turn(chat, endless_folder, model_folder):
    """Nothing but the answers is printed; lines of nothing are passed over."""
    for folder in (endless_folder, model_folder):
        code, out, err = chat(folder, "one", "", "  ", "two", " /three")
        assert (code, err) == (0, f"{folder} {PLAIN}")
        assert out == "".join(f"{answer}\n" for answer in answers(folder, "one", "two", " /three"))
    _, out, _ = chat(endless_folder, "one", more=(*FEW, "--system", "Once."))
    assert out == f"{answers(endless_folder, 'one', system='Once.')[0]}\n"


def test_it_samples_alike_with_the_same_seed(chat, endless_folder):
    first, second, other = (
        chat(endless_folder, "one", "two", more=("--max-new-tokens", 6, "--seed", seed))[1] for seed in (1, 1, 2)
    )
    assert first == second != other


def test_commands(chat, endless_folder):
    code, out, _ = chat(endless_folder, "/stats", "one", "/stats", "/help", "/quit", "never")
    assert code == 0
    assert out.startswith("tokens so far: 0, turns: 0, state: 0.00 MB\n")
    assert re.search(r"^tokens so far: 9, turns: 1, state: 0.0\d MB, ms a token: \d+\.\d$", out, re.M)
    assert all(name in out for name in ("/save FILE ", "/load FILE ", "/stats ", "/help ", "/quit "))
    assert out.endswith("Ctrl-C ends an answer\n")


def test_what_was_saved_is_gone_on_from(chat, endless_folder, tmp_path):
    memory = tmp_path / "my memory"
    code, out, _ = chat(endless_folder, "one", f"/save {memory}", "two", f"/save {memory}", "/stats")
    assert code == 0
    assert out.count(f"{memory} has 0.0 MB\n") == 2
    assert load_memory(load_model(endless_folder), memory).turns == 2
    code, out, _ = chat(endless_folder, "other", f"/load {memory}", "three", f"/save {memory}")
    assert code == 0
    assert f"{memory} remembers 19 tokens; the conversation goes on from there\n" in out
    assert f"\n{answers(endless_folder, 'one', 'two', 'three')[2]}\n" in out


def test_a_line_that_is_refused_does_not_end_the_conversation(chat, endless_folder, model_folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    refused = {
        "/nothing": "there is no /nothing; there are /save FILE, /load FILE, /stats, /help, /quit",
        "/": "there is no /; there are",
        "/load": "/load takes the name of a file: /load FILE",
        "/save  ": "/save takes the name of a file: /save FILE",
        "/stats now": "/stats takes no file: /stats",
        f"/load {tmp_path}/nowhere": "nowhere does not exist",
        f"/load {tmp_path}/mine": "mine is no whole memory file",
        f"/save {tmp_path}/mine": "mine exists, and is no memory of this conversation: give another name",
        f"/save {tmp_path}/no/where": "no is no folder",
        f"/save {endless_folder}/model.safetensors": "which is read: give another name",
        "/save a\0b": "null",
        "/load " + "x" * 300: "too long",
    }
    code, out, err = chat(endless_folder, "one", *refused, "two")
    assert code == 1
    assert out == "".join(f"{answer}\n" for answer in answers(endless_folder, "one", "two"))
    plain, *lines, last = err.splitlines(keepends=True)
    assert plain.endswith(PLAIN)
    assert len(lines) == len(refused)
    assert all(said in line for said, line in zip(refused.values(), lines, strict=True))
    assert last == "error: lines that were refused: 12, each with a line above; the others were answered\n"
    assert (tmp_path / "mine").read_text() == "mine"
    code, _, err = chat(model_folder, "one", f"/save {tmp_path}/m")
    assert code == 1
    assert "no memory of constant size" in err


def test_where_positions_end_is_one_line(chat, model_folder):
    code, out, err = chat(model_folder, "a" * 200, "one")
    assert code == 1
    assert out == f"{answers(model_folder, 'one')[0]}\n"
    assert "this turn 200, and this model's absolute positions end at 128" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens 0"),
        (("--temperature", "0", "--top-k", "5"), "top_k says what to sample from, and at temperature 0 nothing is"),
        (("--top-p", "2"), "top_p 2.0"),
        (("--seed", "-1"), "seed is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(chat, endless_folder, arguments, expected):
    code, out, err = chat(endless_folder, "one", more=arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert expected in err


def test_no_input_is_one_line(monkeypatch, capsys, chat, endless_folder):
    code, out, err = chat(endless_folder)
    assert (code, out) == (1, "")
    assert "standard input is empty" in err
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run(monkeypatch, capsys, "chat", endless_folder)
    assert code == 1
    assert "standard input is closed" in err


def test_ctrl_c_ends_an_answer_of_a_pipe_and_not_the_program(monkeypatch, chat, endless_folder):
    answer = Conversation.answer

    def interrupted(self, *, write, **arguments):
        def told(text):
            write(text)
            if self.turns == 1 and text:
                os.kill(os.getpid(), signal.SIGINT)

        return answer(self, write=told, **arguments)

    whole = chat(endless_folder, "one", "two")[1]
    monkeypatch.setattr(Conversation, "answer", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    code, out, _ = chat(endless_folder, "one", "two", "/stats")
    assert code == 0
    first, second, stats, _ = out.split("\n")
    assert first
    assert whole.startswith(first)
    assert second
    assert not whole.startswith(f"{first}\n")
    assert 10 < int(re.findall(r"tokens so far: (\d+), turns: 2", stats)[0]) < 19  # as many as without
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_at_the_prompt_gives_another_and_ctrl_d_ends(monkeypatch, capsys):
    keys = iter([KeyboardInterrupt, "one", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "two", EOFError])

    def typed(prompt):
        if isinstance(key := next(keys), str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    assert list(_typed()) == ["one", "two"]
    printed = capsys.readouterr()
    assert printed.out == "\n\n"
    assert "this is no UTF-8 text" in printed.err


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments) -> None:
        self.ours, theirs = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastweights", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def until(self, expected: str, seconds: float = 60) -> str:
        """What it prints up to there."""
        end = time.monotonic() + seconds
        while expected not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                shown = os.read(self.ours, 2**16).decode(errors="replace")
                self.shown += re.sub(r"\x1b\[\?2004[hl]\r?", "", shown)  # bracketed paste
        found, _, self.shown = self.shown.partition(expected)
        return found + expected


def test_at_a_terminal(endless_folder, tmp_path):
    """An answer that would never end is ended; lines are edited and come back, and what they hold shows as it is."""
    folder = shutil.copytree(endless_folder, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    terminal = Terminal("chat", folder, "--temperature", 0, "--max-new-tokens", 10**6)
    try:
        assert PLAIN.strip() in terminal.until("Ctrl-D the conversation\r\n> ")
        for turns in (1, 2):
            terminal.type("one\n")
            assert terminal.until("one\r\n") == "one\r\n"
            terminal.until("\\x")  # control characters of the answer, spelt out
            terminal.type("\x03")
            terminal.until("\r\n> ")
            terminal.type("/statx\x7fs\n")
            assert f"turns: {turns}, " in terminal.until("a token: ")
            terminal.until("\r\n> ")
            terminal.type("\x1b[A\n")
            assert "turns" in terminal.until("a token: ")
            terminal.until("\r\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
