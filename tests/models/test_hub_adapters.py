"""Adapters by their names on the hub: from a server that speaks as the hub does, and later without it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastweights.embedded import byte_tokenizer
from fastweights.models import convert
from fastweights.models.adapters import save_adapter
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_llama

COMMIT = "1" * 40


class Hub:
    """Serves folders as repositories, `owner/name` each."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_content=False)

            def do_GET(self) -> None:
                hub.answer(self, with_content=True)

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, with_content: bool) -> None:
        path = request.path.partition("?")[0].removeprefix("/")
        self.asked.append(path)
        headers, content = {"X-Repo-Commit": COMMIT}, None
        if path.startswith("api/models/"):
            name, _, of_folder = path.removeprefix("api/models/").partition("/tree/")
            if of_folder:  # of chat templates, of which there are none
                headers["X-Error-Code"] = "EntryNotFound"
            elif (self.root / name).is_dir():
                files = [{"rfilename": file.name} for file in sorted((self.root / name).iterdir())]
                content = json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()
                headers["Content-Type"] = "application/json"
        elif "/resolve/main/" in path or f"/resolve/{COMMIT}/" in path:
            name, _, file = path.replace(f"/resolve/{COMMIT}/", "/resolve/main/").partition("/resolve/main/")
            if (self.root / name / file).is_file():
                content = (self.root / name / file).read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            else:
                headers["X-Error-Code"] = "EntryNotFound"
        if content is None:
            headers.setdefault("X-Error-Code", "RepoNotFound")
        request.send_response(404 if content is None else 200)
        for header, value in {**headers, "Content-Length": str(len(content or b""))}.items():
            request.send_header(header, value)
        request.end_headers()
        if with_content and content is not None:
            request.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """With an adapter, the model that it is of, and one of peft's adapters."""
    base = tmp_path / "hub" / "owner" / "base"
    make_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    adapter = tmp_path / "hub" / "owner" / "adapter"
    original = make_llama()
    original.config.name_or_path = "owner/base"
    save_adapter(convert(original, ConversionConfig(window=8)), adapter, base=original)
    shutil.copytree(adapter, tmp_path / "hub" / "owner" / "of-peft")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    del config["fastweights"]
    (tmp_path / "hub" / "owner" / "of-peft" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def run(folder: Path, code: str, hub: Hub | None) -> str:
    """By a process of its own, as the hub's address is read once; without a hub where none is given."""
    place = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **place}
    imports = "from fastweights.models.loading import load_model, load_tokenizer\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


LOAD = """
model, tokenizer = load_model("owner/adapter"), load_tokenizer("owner/adapter")
print(type(model).__name__, model.config.base_model, len(tokenizer), model.config.windows)
"""
LOADED = "FastWeightsForCausalLM owner/base 257 [8, 8, 8]"


def test_an_adapter_is_downloaded_with_its_base_and_stays(hub, tmp_path):
    assert run(tmp_path, LOAD, hub) == LOADED
    files = [path.rpartition("/")[2] for path in hub.asked if path.startswith("owner/adapter/resolve")]
    assert {"adapter_config.json", "adapter_model.safetensors"} == set(files)
    assert run(tmp_path, LOAD, None) == LOADED
    code = 'from fastweights.models.adapters import load_adapter; print(load_adapter("owner/adapter").config.windows)'
    assert run(tmp_path, code, None) == "[8, 8, 8]"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/nothing", "there is no folder owner/nothing, and the Hugging Face hub has no such model"),
        ("owner/of-peft", "cannot load a model from owner/of-peft"),
    ],
)
def test_what_is_no_adapter_of_ours(hub, tmp_path, name, reason):
    assert reason in run(tmp_path, f'load_model("{name}")', hub)


def test_an_adapter_without_its_weights_is_said_in_one_line(hub, tmp_path):
    (tmp_path / "hub" / "owner" / "adapter" / "adapter_model.safetensors").unlink()
    said = run(tmp_path, 'load_model("owner/adapter")', hub)
    assert "cannot download adapter_config.json and adapter_model.safetensors of owner/adapter" in said
