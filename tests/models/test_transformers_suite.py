"""transformers' own tests of any model, its ModelTesterMixin, on converted ones.

They are in transformers' source distribution, which `make test` unpacks beside the environment, and in no wheel. Its
tests of generation are not even there: test_generation.py has their cases.
"""

from __future__ import annotations

import importlib
import sys
import unittest
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, LlamaConfig

from fastweights.models import FastWeightsConfig, FastWeightsForCausalLM, FastWeightsModel

_FOLDER = Path(sys.prefix) / f"transformers-tests-{transformers.__version__}"
_PACKAGE = "transformers_tests"
_MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}

SKIPPED = {
    "test_generation_tester_mixin_inheritance": "transformers' source distribution has no GenerationTesterMixin",
}
"""Tests that are not run, and why; the others that are skipped say it themselves."""


def _load() -> Any:
    """The mixin's module, of a package made of the folder; mixins that it lacks are empty there."""
    if not (_FOLDER / "test_modeling_common.py").exists():
        pytest.skip(f"{_FOLDER} is not there: run make test", allow_module_level=True)
    pytest.importorskip("parameterized", reason="transformers' tests need it")
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(_FOLDER)]
    sys.modules[_PACKAGE] = package
    for name, mixin in _MISSING.items():
        sys.modules[f"{_PACKAGE}.{name.split('.')[0]}"] = ModuleType(name.split(".")[0])
        module = sys.modules[f"{_PACKAGE}.{name}"] = ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        suite = importlib.import_module(f"{_PACKAGE}.test_modeling_common")
    # By these it tells models with a head from those without.
    for table, model in (("MODEL_MAPPING_NAMES", FastWeightsModel), ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", None)):
        names = dict(getattr(suite, table), fastweights=(model or FastWeightsForCausalLM).__name__)
        setattr(suite, table, names)
    return suite


suite = _load()


class _ModelTester:
    """What transformers' tests ask about a model."""

    is_training = True
    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2

    def __init__(self, family: str, conversion: dict) -> None:
        self.family, self.conversion = family, conversion

    def get_config(self) -> FastWeightsConfig:
        settings: dict = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
        settings |= {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        settings |= {"num_attention_heads": self.num_attention_heads}
        if self.family == "gpt2":
            base = GPT2Config(**settings)
        else:
            base = LlamaConfig(intermediate_size=37, num_key_value_heads=1, **settings)
        return FastWeightsConfig(base_config=base, conversion=dict(self.conversion))

    def prepare_config_and_inputs_for_common(self) -> tuple[FastWeightsConfig, dict]:
        ids = suite.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class _Common(suite.ModelTesterMixin):
    all_model_classes = (FastWeightsModel, FastWeightsForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True
    family, conversion = "gpt2", {}

    def setUp(self) -> None:
        self.model_tester = _ModelTester(self.family, self.conversion)
        # There are no attention maps, which tests leave out then; other tests take it for no attention at all.
        self.has_attentions = "sdpa" in self._testMethodName


for _name, _reason in SKIPPED.items():
    assert hasattr(_Common, _name), _name
    setattr(_Common, _name, unittest.skip(_reason)(getattr(_Common, _name)))

_MIXED = {"window": 4, "layer_types": ["full_attention", "hybrid_sliding"]}


class GPT2PureTest(_Common, unittest.TestCase):
    pass


class GPT2MixedTest(_Common, unittest.TestCase):
    conversion = _MIXED


class LlamaHybridTest(_Common, unittest.TestCase):
    family, conversion = "llama", {"window": 4}


class LlamaMixedTest(_Common, unittest.TestCase):
    family, conversion = "llama", _MIXED
