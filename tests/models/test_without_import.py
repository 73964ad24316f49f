"""A saved model where nobody has said `import fastweights`: transformers loads it with trust_remote_code=True."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastweights.models import convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import random_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """A converted model, saved."""
    saved = tmp_path_factory.mktemp("without") / "converted"
    convert(model_folder, ConversionConfig(window=8)).save_pretrained(saved)
    load_tokenizer(model_folder).save_pretrained(saved)
    return saved


def run(program: str, folder, tmp_path) -> str:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_transformers_loads_it_and_saves_it_again(folder, tmp_path):
    out = run(
        "import sys, json, torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "folder, output = sys.argv[1:]\n"
        "assert 'fastweights' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is type(model.config)\n"
        "assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model.model)\n"
        "model.save_pretrained(output + '/again')\n"
        "AutoTokenizer.from_pretrained(folder).save_pretrained(output + '/again')\n"
        "ids = torch.tensor([[5, 6, 7]])\n"
        "print(json.dumps([type(model).__module__, model(ids).logits.tolist()]))\n",
        folder,
        tmp_path,
    )
    module, logits = json.loads(out)
    assert module == "fastweights.models.modeling"
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(torch.tensor(logits), expected)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert {name for name in names if name.endswith(".py")} == {"modeling_fastweights.py"}
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_pipeline_writes_with_it(folder, tmp_path):
    out = run(
        "import sys, json\n"
        "from transformers import pipeline\n"
        "write = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps(write('def f', max_new_tokens=5, do_sample=False, return_full_text=False)))\n",
        folder,
        tmp_path,
    )
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("def f", return_tensors="pt")
    whole = load_model(folder).generate(**ids, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(out.splitlines()[-1])[0]["generated_text"] == expected


def test_our_own_loading_runs_no_code_of_the_folder(folder):
    """What stands beside the weights is for transformers; whatever it were, we would not run it."""
    shim = folder / "modeling_fastweights.py"
    code = shim.read_text()
    shim.write_text("raise SystemExit('this was run')\n")
    try:
        model = load_model(folder)
    finally:
        shim.write_text(code)
    with torch.no_grad():
        assert model(random_ids(1, 4)).logits.isfinite().all()


def test_without_the_package_transformers_says_what_to_install(folder, tmp_path):
    out = run(
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Hidden(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'fastweights':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from transformers import AutoModelForCausalLM\n"
        "try:\n"
        "    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "except ImportError as error:\n"
        "    print(error)\n",
        folder,
        tmp_path,
    )
    assert "pip install fastweights" in out
