"""The command line is UTF-8 in any locale: arguments, of which each command here has one, standard input and files."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys

import pytest

from fastweights.cli.console import use_utf8
from tests.forks import Forks

PROMPT = "Grüße, 漢字"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
}


@pytest.fixture(scope="module", params=LOCALES)
def run(request):
    """Runs the command in that locale."""
    locale = LOCALES[request.param]
    if request.param != "C":
        with Forks(**locale) as forks:
            yield forks.run
        return

    def from_the_start(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
        """There it starts itself anew, which no fork can."""
        command = [sys.executable, "-m", "fastweights", *map(str, arguments)]
        environment = os.environ | locale
        return subprocess.run(command, input=given, capture_output=True, encoding="utf-8", timeout=300, env=environment)

    yield from_the_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder) -> str:
    return str(shutil.copytree(model_folder, tmp_path_factory.mktemp("модели") / "modèle"))


def test_prompts_are_utf8(folder, run):
    done = run("generate", folder, "--prompt", "-", "--max-new-tokens", "3", given=PROMPT)
    assert (done.returncode, done.stdout[: len(PROMPT)]) == (0, PROMPT), done.stderr


def test_texts_and_recipes_are_utf8(folder, run, tmp_path):
    (tmp_path / "tëxt.txt").write_text("Grüße, 漢字. " * 50, encoding="utf-8")
    (tmp_path / "récipe.toml").write_text('# ä comment\n"block-size" = 32\n', encoding="utf-8")
    recipe = ("--config", str(tmp_path / "récipe.toml"))
    done = run(*recipe, "eval", folder, "--text", tmp_path / "tëxt.txt")
    assert done.returncode == 0, done.stderr
    assert "blocks of 32 tokens" in " ".join(done.stdout.split())


def test_errors_are_utf8(run):
    done = run("generate", "./niñgún")
    assert done.returncode == 1
    assert "./niñgún does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_no_encoding_has_is_spelt_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr("sys.stdin", None)  # closed
    use_utf8()
    print("é\ud800", end="", flush=True)
    assert raw.getvalue() == "é\\ud800".encode()
