"""What the base model says survives conversion, saving and loading; a model without its head is what it is with it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import FastWeightsModel, convert
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import MAKERS, make_gpt2, make_llama, random_ids
from tests.models.test_fast_weight_layer import trained
from tests.ops.problems import error

MIXED = ["linear_attention", "full_attention", "hybrid_sliding"]
KINDS = {
    "pure": ConversionConfig(),
    "hybrid": ConversionConfig(window=8),
    "mixed": ConversionConfig(window=8, layer_types=MIXED),
}
SOFTMAX = ConversionConfig(layer_types=["full_attention"] * 3)
TOP_LEVEL = (
    "max_position_embeddings",
    "use_cache",
    "tie_word_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "layer_types",
)


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


@pytest.fixture(params=[*KINDS, "block", "hybrid block"])
def model(family, request):
    if "block" in request.param:
        return trained(MAKERS[family](tie_word_embeddings=True), kind="hybrid" if "hybrid" in request.param else "pure")
    return convert(MAKERS[family](), KINDS[request.param]).eval()


def test_generation_config_survives(family, tmp_path):
    base = MAKERS[family]()
    given = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    given |= {"repetition_penalty": 1.1, "max_new_tokens": 33, "pad_token_id": 5}
    base.generation_config.update(**given)
    converted = convert(base)
    converted.save_pretrained(tmp_path)
    for model in (converted, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert {name: getattr(model.generation_config, name) for name in given} == given
    whole = [model.generation_config.to_dict() for model in (base, AutoModelForCausalLM.from_pretrained(tmp_path))]
    assert whole[0] == whole[1]


def test_generation_config_from_a_folder_survives(family, tmp_path):
    base = MAKERS[family]()
    base.generation_config.update(eos_token_id=[2, 7], do_sample=True, top_k=20)
    base.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base").save_pretrained(tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").generation_config
    assert (loaded.eos_token_id, loaded.do_sample, loaded.top_k) == ([2, 7], True, 20)


def test_generation_stops_at_each_of_several_ends(family):
    base = MAKERS[family]()
    model, ids = convert(base), random_ids(1, 5)
    mask = torch.ones_like(ids)
    said = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)[
        0, 5:
    ].tolist()
    base.generation_config.update(eos_token_id=[300, said[2]], do_sample=False, max_new_tokens=8)
    stopped = convert(base).generate(ids, attention_mask=mask)[0, 5:].tolist()
    assert stopped == said[: said.index(said[2]) + 1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_config_says_at_the_top_what_the_base_says(family, kind, tied, tmp_path):
    base = MAKERS[family](tie_word_embeddings=tied)
    base.config.use_cache = False
    model = convert(base, KINDS[kind])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in TOP_LEVEL[:6] + TOP_LEVEL[8:9]:
        assert saved[name] == getattr(base.config, name), name
    loaded = AutoConfig.from_pretrained(tmp_path)
    for name in TOP_LEVEL:
        assert saved[name] == getattr(model.config, name) == getattr(loaded, name), name
    assert saved.get("sliding_window") == getattr(loaded, "sliding_window", None) == (KINDS[kind].window or None)
    assert loaded.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved


def test_sliding_window_can_be_set():
    config = convert(make_llama(), KINDS["mixed"]).config
    before = config.to_dict()
    config.sliding_window = 8
    assert config.to_dict() == before
    config.sliding_window = 4
    assert (config.sliding_window, config.settings.window, config.to_dict()["sliding_window"]) == (4, 4, 4)
    model = FastWeightsModel(config)
    assert [attention.window for attention in model.fast_attentions()] == [0, 4]
    with pytest.raises(FastWeightsError, match="window of 2 up"):
        config.sliding_window = None
    pure = convert(make_llama()).config
    assert not hasattr(pure, "sliding_window")
    pure.sliding_window = None
    with pytest.raises(FastWeightsError, match="no hybrid_sliding"):
        pure.sliding_window = 4


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_window_set_in_the_config_of_a_model_is_that_of_what_is_loaded(sinks, tmp_path):
    """Its caches would be made for another window than its layers have."""
    model = convert(make_llama(), ConversionConfig(window=8, sinks=sinks))
    model.config.sliding_window = 4
    with pytest.raises(FastWeightsError, match=r"windows are \[4, 4, 4\] now, and the model was made with \[8, 8, 8\]"):
        model(random_ids(1, 9))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.window for layer in loaded.fast_attentions()] == [4, 4, 4]
    assert loaded(random_ids(1, 9)).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_without_a_config(model):
    ids = random_ids(2, 20)
    cache, pieces = DynamicCache(), []
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        pieces.append(model(ids[:, start:stop], cache=cache).logits)
        assert cache.get_seq_length() == stop
    assert error(torch.cat(pieces, 1), model(ids).logits) <= tolerances.FLOAT32
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    arguments["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, **arguments)
    assert model.generate(ids, cache=DynamicCache(), **arguments).equal(expected)
    warm = DynamicCache()
    model(ids[:, :13], cache=warm)
    assert model.generate(ids, cache=warm, **arguments).equal(expected)


@torch.no_grad()
def test_attention_maps_of_models_that_have_them(family):
    base = MAKERS[family]()
    base.set_attn_implementation("eager")
    model, ids = convert(base, SOFTMAX), random_ids(2, 9)
    for found in (model(ids, output_attentions=True), model.model(ids, output_attentions=True)):
        assert len(found.attentions) == 3
        expected = base(ids, output_attentions=True).attentions
        assert all(error(a, b) <= tolerances.FLOAT32 for a, b in zip(found.attentions, expected, strict=True))
    assert model.config._attn_implementation == "eager"
    model.config.output_attentions = model.config.output_hidden_states = True
    for part in (model, model.model):
        assert len(part(ids).attentions) == 3
        assert len(part(ids).hidden_states) == 4
        assert part(ids, output_attentions=False, output_hidden_states=False).attentions is None
    model.config.output_attentions = False
    cache = model(ids, use_cache=True).cache
    assert len(model(ids[:, :1], cache=cache).hidden_states) == 4  # of a single token, too


@torch.no_grad()
@pytest.mark.parametrize(("kind", "says"), [("pure", "no other layers"), ("mixed", "only layers 1 have")])
def test_attention_maps_of_others_are_refused_in_a_line(family, kind, says):
    model, ids = convert(MAKERS[family](), KINDS[kind]), random_ids(2, 9)
    for part in (model, model.model):
        with pytest.raises(FastWeightsError, match=says) as caught:
            part(ids, output_attentions=True)
        assert "\n" not in str(caught.value)
        assert part(ids, output_attentions=False).attentions is None


@torch.no_grad()
def test_use_cache_of_the_config(model):
    ids = random_ids(2, 9)
    assert model(ids).cache is not None
    assert model.model(ids).cache is not None
    model.config.use_cache = False
    for part in (model, model.model):
        assert part(ids).cache is None
        assert part(ids, use_cache=True).cache is not None
    model.config.use_cache = True
    for part in (model.train(), model.model):
        assert part(ids).cache is None


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = random_ids(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :7], mask[2, :20] = 0, 0
    return ids.masked_fill(mask == 0, 256), mask


@torch.no_grad()
def test_headless_it_gives_what_the_unembedding_is_given(model, tmp_path):
    given = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    ids, mask = padded_batch()
    logits = model(ids, attention_mask=mask).logits
    hook.remove()
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is FastWeightsModel
    for part in (model.base_model, headless):
        found = part(ids, attention_mask=mask).last_hidden_state
        assert found.equal(given[0])
        assert model.lm_head(found).equal(logits)
    for row in range(3):
        alone = headless(ids[row : row + 1, mask[row].bool()]).last_hidden_state
        assert error(headless(ids, attention_mask=mask).last_hidden_state[row, mask[row].bool()], alone[0]) <= (
            tolerances.FLOAT32
        )


@torch.no_grad()
def test_headless_and_untied_a_fast_weight_layer_is_refused(tmp_path):
    model, ids = trained(make_llama(tie_word_embeddings=False)), random_ids(2, 9)
    assert model.base_model(ids).last_hidden_state is not None  # its head is at hand
    model.save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match="load it with AutoModelForCausalLM") as caught:
        AutoModel.from_pretrained(tmp_path)(ids)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_headless_model_saved_alone_loads(tmp_path):
    model, ids = convert(make_gpt2(), KINDS["hybrid"]), random_ids(2, 9)
    model.model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits.equal(model(ids).logits)
