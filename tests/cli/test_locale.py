"""The command line is UTF-8 in any locale."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys

import pytest

from fastweights.cli.console import use_utf8

PROMPT = "Grüße, 漢字"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
}


def run(locale: str, *arguments: str, given: str = "") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "fastweights", *arguments]
    done = subprocess.run(
        command, input=given.encode(), capture_output=True, timeout=300, env=os.environ | LOCALES[locale]
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder) -> str:
    return str(shutil.copytree(model_folder, tmp_path_factory.mktemp("модели") / "modèle"))


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("way", ["argument", "standard input"])
def test_prompts_are_utf8(folder, locale, way):
    prompt, given = (PROMPT, "") if way == "argument" else ("-", PROMPT)
    code, out, err = run(locale, "generate", folder, "--prompt", prompt, "--max-new-tokens", "3", given=given)
    assert (code, out[: len(PROMPT)]) == (0, PROMPT), err


@pytest.mark.parametrize("locale", LOCALES)
def test_texts_and_recipes_are_utf8(folder, locale, tmp_path):
    (tmp_path / "tëxt.txt").write_text("Grüße, 漢字. " * 50, encoding="utf-8")
    (tmp_path / "récipe.toml").write_text('# ä comment\n"block-size" = 32\n', encoding="utf-8")
    recipe = ("--config", str(tmp_path / "récipe.toml"))
    code, out, err = run(locale, *recipe, "eval", folder, "--text", str(tmp_path / "tëxt.txt"))
    assert code == 0, err
    assert "blocks of 32 tokens" in " ".join(out.split())


@pytest.mark.parametrize("locale", LOCALES)
def test_errors_are_utf8(locale):
    code, _, err = run(locale, "generate", "./niñgún")
    assert code == 1
    assert "does not exist" in err
    assert "Traceback" not in err


def test_what_no_encoding_has_is_spelt_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr("sys.stdin", None)  # closed
    use_utf8()
    print("é\ud800", end="", flush=True)
    assert raw.getvalue() == "é\\ud800".encode()
