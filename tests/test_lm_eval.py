"""lm-eval's command line with our models, and one line where it is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

HIDDEN = """import runpy, sys
class Hidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
runpy.run_module("fastweights.lm_eval", run_name="__main__")
"""


def run(*arguments: str, folder) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=280)


def test_without_lm_eval_a_line_says_what_to_install(tmp_path):
    done = run("-c", HIDDEN, folder=tmp_path)
    line = "error: lm-eval, or what it needs (lm_eval), is not installed: pip install 'fastweights[lm-eval]'\n"
    # Before it may stand what torchao says of itself, where that is installed.
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1], done.stdout) == (1, line, "")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_its_command_line_knows_our_models(endless_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps({'text': 'word ' * i})}\n" for i in (1, 40)))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))
    model = ["--model", "fastweights", "--model_args", f"pretrained={endless_folder},weights=int8"]
    tasks = ["--tasks", str(tmp_path / "words.yaml"), "--device", "cpu"]
    done = run("-m", "fastweights.lm_eval", *model, *tasks, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|bits_per_byte" in done.stdout
