"""A saved model behind transformers' own server: `transformers serve FOLDER`, asked by its clients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from fastweights.embedded import byte_tokenizer
from fastweights.models import convert, load_model
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_llama

PACKAGES = Path(__file__).parents[2] / ".venv" / "serving"
"""FastAPI and what else the server needs."""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
QUESTION = [{"role": "user", "content": "Where is the key?"}]

pytestmark = pytest.mark.skipif(
    not PACKAGES.exists(), reason="FastAPI is not installed: make test puts it into .venv/serving"
)


def environment(tmp_path) -> dict[str, str]:
    paths = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": str(tmp_path / "modules"), "NO_COLOR": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *arguments]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def asked(address: str, what: dict | None = None) -> str:
    body = None if what is None else json.dumps(what).encode()
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model with a chat template, saved."""
    saved = tmp_path_factory.mktemp("serving") / "converted"
    torch.manual_seed(0)
    convert(make_llama(), ConversionConfig(window=8)).save_pretrained(saved)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of a server of that model; nothing in it says `import fastweights`."""
    port, tmp_path = free_port(), tmp_path_factory.mktemp("server")
    arguments = ("serve", str(folder), "--trust-remote-code", "--port", str(port))
    with (tmp_path / "log").open("w") as log:
        offline = {**environment(tmp_path), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command(*arguments), env=offline, stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://localhost:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                asked(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def expected(folder) -> str:
    """What the model says."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.apply_chat_template(QUESTION, return_tensors="pt", return_dict=True)
    said = load_model(folder).generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_answers_a_request_as_the_model_does(server, folder, expected):
    request = {"model": str(folder), "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = json.loads(asked(f"{server}/v1/chat/completions", {**request, "stream": False}))
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["completion_tokens"] <= 12
    lines = asked(f"{server}/v1/chat/completions", {**request, "stream": True}).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected


def test_transformers_chat_talks_to_it(server, folder, tmp_path):
    flags = ("do_sample=False", "max_new_tokens=12")
    done = subprocess.run(
        command("chat", str(folder), server, *flags),
        input=f"{QUESTION[0]['content']}\nn\n!exit\n",  # no, it need not go on
        capture_output=True,
        text=True,
        env={**environment(tmp_path), "HF_HUB_OFFLINE": "0"},  # offline, its client asks no server at all
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 tokens in" in done.stdout, done.stdout
