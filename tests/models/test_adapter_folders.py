"""Conversions as adapters: peft reads them as we do, the right base model alone takes them, and damage is one line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert, load_model
from fastweights.models.adapters import load_adapter, save_adapter
from fastweights.models.loading import adapter_folder, load_tokenizer
from fastweights.models.lora import add_lora
from fastweights.reading.memory import fingerprint, load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import MAKERS, make_gpt2, make_llama, random_ids
from tests.ops.problems import error

peft = pytest.importorskip("peft", reason="LoRA is peft's")
KINDS = {
    "pure": ConversionConfig(rule="delta_and_average", positions="drop", gate_rank=2),
    "hybrid": ConversionConfig(window=8),
    "gated": ConversionConfig(window=8, rule="gated", feature_map="softmax"),
    "delta": ConversionConfig(window=8, rule="gated_delta", feature_map="linear", value_map=True, conv_size=4),
    "gate on the mix": ConversionConfig(window=8, rule="gated_delta", mix_gate=True),
    "partly": ConversionConfig(
        window=8, positions="drop", layer_types=["full_attention", "hybrid_sliding", "linear_attention"]
    ),
}
PROJECTIONS = {"gpt2": ["c_attn", "attn.c_proj"], "llama": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ROUNDING_TO_BF16 = 0.02


def train(model, targets=None, rank: int = 4, alpha: int | None = None):
    """As if: all that may be trained is some random value."""
    if targets:
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft, of GPT-2's Conv1D
            peft.inject_adapter_in_model(settings, model, "default")
    torch.manual_seed(4)
    new = set(model.new_parameter_names())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name in new:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.fast_attentions():
            layer.fast_unit.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


@pytest.fixture
def base_folder(family, tmp_path):
    MAKERS[family]().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base_folder, family, tmp_path):
    """The folder of an adapter of the hybrid form, with LoRA."""
    save_adapter(
        train(convert(base_folder, KINDS["hybrid"]), PROJECTIONS[family]), tmp_path / "adapter", base=base_folder
    )
    return tmp_path / "adapter"


def with_peft(base_folder, kind, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(convert(base_folder, KINDS[kind]), folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "gates alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_was_trained_and_what_peft_says(base_folder, tmp_path, family, kind, lora):
    ids = random_ids(2, 30)
    untrained = convert(base_folder, KINDS[kind])(ids).logits
    model = train(convert(base_folder, KINDS[kind]), PROJECTIONS[family] if lora else None)
    trained = model(ids).logits
    save_adapter(model, tmp_path / "adapter", base=base_folder)
    assert model(ids).logits.equal(trained)
    loaded = load_model(tmp_path / "adapter")
    assert not loaded.training
    assert error(loaded(ids).logits, trained) < ROUNDING_TO_BF16 < error(untrained, trained) / 5
    theirs = with_peft(base_folder, kind, tmp_path / "adapter")
    assert error(theirs(input_ids=ids).logits, loaded(ids).logits) <= tolerances.FLOAT32
    assert error(theirs.merge_and_unload()(ids).logits, loaded(ids).logits) <= tolerances.FLOAT32


@torch.no_grad()
def test_lora_on_gates_is_part_of_it(base_folder, tmp_path, family):
    model = train(convert(base_folder, KINDS["hybrid"]), [*PROJECTIONS[family], "key_gate"])
    save_adapter(model, tmp_path / "adapter", base=base_folder)
    ids = random_ids(2, 30)
    loaded, theirs = load_model(tmp_path / "adapter"), with_peft(base_folder, "hybrid", tmp_path / "adapter")
    assert error(loaded(ids).logits, model(ids).logits) < ROUNDING_TO_BF16
    assert error(theirs(input_ids=ids).logits, loaded(ids).logits) <= tolerances.FLOAT32


@torch.no_grad()
def test_what_training_with_lora_leaves_is_saved(base_folder, tmp_path):
    model = convert(base_folder, KINDS["partly"])
    add_lora(model, 4)
    model, ids = train(model), random_ids(2, 30)
    save_adapter(model, tmp_path / "adapter", base=base_folder)
    trained = model(ids).logits
    assert error(load_model(tmp_path / "adapter")(ids).logits, trained) < ROUNDING_TO_BF16


@torch.no_grad()
def test_a_longer_window_needs_no_training(tmp_path):
    """With one as long as the text, and factors that leave it as it is, the base model's own logits."""
    base, ids = make_llama(), random_ids(1, 40)
    base.save_pretrained(tmp_path / "base")
    model = convert(tmp_path / "base", ConversionConfig(window=4))
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert load_adapter(tmp_path / "adapter").config.sliding_window == 4
    longer = load_adapter(tmp_path / "adapter", window=40)
    assert longer.config.sliding_window == 40
    assert error(longer(ids).logits, base(ids).logits) <= tolerances.FLOAT32
    pure = convert(tmp_path / "base")
    save_adapter(pure, tmp_path / "pure", base=tmp_path / "base")
    for folder, window in (("adapter", 1), ("pure", 8)):
        with pytest.raises(FastWeightsError, match=f"window is {window}, and that of the adapter .*{folder}"):
            load_adapter(tmp_path / folder, window=window)


@torch.no_grad()
def test_a_longer_window_for_the_layers_that_have_a_long_one(tmp_path):
    base, ids = make_llama(), random_ids(1, 40)
    base.save_pretrained(tmp_path / "base")
    settings = ConversionConfig(window=4, wide_window=12, layers="0,2")
    save_adapter(convert(base, settings), tmp_path / "adapter", base=tmp_path / "base")
    longer = load_adapter(tmp_path / "adapter", wide_window=30)
    assert (longer.config.windows, longer.config.settings.wide_window) == ([4, 30, 4], 30)
    assert load_adapter(tmp_path / "adapter", window=20, wide_window=30).config.windows == [20, 30, 20]
    assert load_adapter(tmp_path / "adapter", window=2, wide_window=3).config.windows == [2, 3, 2]
    assert load_adapter(tmp_path / "adapter", window=12).config.windows == [12, 12, 12]
    small = load_adapter(tmp_path / "adapter", window=20, window_dtype="int8")
    assert (small.config.windows, small.config.windows_in_eight_bits) == ([20, 20, 20], True)
    assert load_adapter(tmp_path / "adapter", state_dtype="int8").config.states_in_eight_bits
    for name in ("window_dtype", "state_dtype"):
        with pytest.raises(FastWeightsError, match=f"{name} 'int7' is unknown; known are auto, int8"):
            load_adapter(tmp_path / "adapter", **{name: "int7"})
    expected = convert(base, replace(settings, wide_window=30))
    assert error(longer(ids).logits, expected(ids).logits) <= tolerances.FLOAT32
    save_adapter(convert(base, ConversionConfig(window=4)), tmp_path / "one", base=tmp_path / "base")
    for folder, wide in (("adapter", 4), ("one", 30)):
        with pytest.raises(FastWeightsError, match=f"wide_window is {wide}, and that of the adapter .*{folder}"):
            load_adapter(tmp_path / folder, wide_window=wide)


@torch.no_grad()
def test_lora_of_any_scale_and_place_can_stand_beside_the_weights(base_folder, tmp_path, family):
    places = [PROJECTIONS[family][0], "key_gate", {"gpt2": "c_fc", "llama": "up_proj"}[family]]
    model = train(convert(base_folder, KINDS["hybrid"]), places, alpha=3)
    save_adapter(model, tmp_path / "adapter", base=base_folder)
    ids, beside = random_ids(2, 30), load_adapter(tmp_path / "adapter", merge=False)
    assert error(beside(ids).logits, load_model(tmp_path / "adapter")(ids).logits) <= tolerances.FLOAT32
    before = {name for name, _ in beside.named_parameters()}
    add_lora(beside, 4)
    assert before == {name for name, parameter in beside.named_parameters()}
    assert all(parameter.requires_grad for name, parameter in beside.named_parameters() if "lora_" in name)


def test_what_is_loaded_is_plain(adapter, base_folder):
    model = load_model(adapter)
    kinds = {type(module) for name, module in model.named_modules() if name.rpartition(".")[2] in ("c_attn", "q_proj")}
    assert kinds <= {nn.Linear, Conv1D}
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    assert all("forward" in vars(module) for module in model.modules() if type(module) in kinds)  # oneDNN's
    assert model.config.base_model == str(base_folder.resolve())
    assert model.config.name_or_path == str(adapter.resolve())
    assert load_model(adapter, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(adapter).get_vocab() == byte_tokenizer().get_vocab()


def test_peft_is_not_needed_to_load(adapter):
    code = "import sys; sys.modules['peft'] = None; import fastweights; fastweights.load_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(adapter)], check=True, timeout=120)


def test_matrices_take_two_bytes_and_vectors_four(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert any(".lora_A.weight" in name for name in tensors)
    assert any(".fast_scale" in name for name in tensors)
    assert any(".fast_unit" in name for name in tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim > 1 else torch.float32), name
        assert name.startswith("base_model.model.model.base."), name


def test_an_adapter_from_before_factors_had_units_has_units_of_one(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if ".fast_unit" not in name}, file, metadata={"format": "pt"})
    for layer in load_model(adapter).fast_attentions():
        assert layer.fast_unit.eq(1).all()


def test_memories_know_their_model_again(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = train(convert(tmp_path / "base", KINDS["hybrid"]), PROJECTIONS["llama"])
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    once, again = load_model(tmp_path / "adapter"), load_model(tmp_path / "adapter")
    assert fingerprint(once) == fingerprint(again)
    file = new_memory(once).read([random_ids(1, 50)[0]]).save(tmp_path / "memory")
    assert load_memory(again, file).tokens == 50


@torch.no_grad()
def test_copies_of_the_base_model_pass(adapter, base_folder, family, tmp_path):
    """In bf16, and quantised: what four bits leave of a matrix."""
    gguf = pytest.importorskip("gguf")
    load_model(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    load_adapter(adapter, tmp_path / "copy")
    for kind in ("Q8_0", "Q4_1", "Q4_0"):
        copy = load_model(base_folder)
        for parameter in copy.parameters():
            if parameter.ndim > 1:
                kind_of = gguf.GGMLQuantizationType[kind]
                short = gguf.quants.quantize(parameter.numpy(), kind_of)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(short, kind_of)))
        copy.save_pretrained(tmp_path / "copy")
        load_adapter(adapter, tmp_path / "copy")


def other_seed(model):
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            torch.manual_seed(i + 100)
            nn.init.normal_(parameter, std=0.2)
    return model


def trained_on(model):
    for parameter in model.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter) * parameter.norm() / parameter.numel() ** 0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda family: other_seed(MAKERS[family]()), "its matrices differ by ...%"),
        (lambda family: trained_on(MAKERS[family]()), "its vectors differ by"),
        (lambda family: (make_llama if family == "gpt2" else make_gpt2)(), "it has model_type"),
        (lambda family: MAKERS[family](**{"n_layer" if family == "gpt2" else "num_hidden_layers": 4}), "num_hidden_la"),
        (lambda family: convert(MAKERS[family]()), "it has model_type fastweights"),
    ],
    ids=["other weights", "trained on", "other family", "other size", "converted"],
)
def test_another_base_model_is_refused(adapter, family, tmp_path, other, reason):
    other(family).save_pretrained(tmp_path / "other")
    with pytest.raises(FastWeightsError, match=f"is not the base model of the adapter .*{reason}") as caught:
        load_adapter(adapter, tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_base_model_that_is_gone_is_said(adapter, base_folder):
    shutil.move(base_folder, base_folder.with_name("moved"))
    with pytest.raises(FastWeightsError, match=r"base model of the adapter .* is not to be had: .*base does not exist"):
        load_model(adapter)
    load_adapter(adapter, base_folder.with_name("moved"))
    change(adapter, base_model_name_or_path=None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match=r"does not name its base model: .*merge .*--base"):
            load(adapter)


def test_the_weights_of_the_base_model_may_be_shared(adapter, base_folder):
    """Where LoRA stands beside them."""
    base = load_model(base_folder)
    for share in (False, True):
        model = load_adapter(adapter, base, merge=False, share=share)
        same = {x.data_ptr() for x in base.parameters()} & {x.data_ptr() for x in model.parameters()}
        assert bool(same) == share
        assert error(model(random_ids(1, 9)).logits, load_adapter(adapter, base)(random_ids(1, 9)).logits) <= 1e-5
    for given in ({"merge": True, "base": base}, {"merge": False}):
        with pytest.raises(FastWeightsError, match="share was given, which is for a base model at hand"):
            load_adapter(adapter, share=True, **given)


def test_more_than_an_adapter_holds_is_not_left_out(base_folder, family, tmp_path):
    model = train(convert(base_folder, KINDS["hybrid"]), PROJECTIONS[family])
    with torch.no_grad():
        next(model.model.base.parameters())[0, 0] += 1e-3
    with pytest.raises(FastWeightsError, match=r"is not as in the base model .* train with LoRA"):
        save_adapter(model, tmp_path / "adapter", base=base_folder)
    with pytest.raises(FastWeightsError, match=r"fast_weight_layer.* is not as in the base model"):
        save_adapter(add_fast_weight_layer(base_folder), tmp_path / "adapter", base=base_folder)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {".*0.*": 3}}, {"alpha_pattern": {".*0.*": 3}}],
    ids=str,
)
def test_other_kinds_of_lora_are_refused(tmp_path, settings):
    model = convert(make_llama(), KINDS["hybrid"])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    peft.inject_adapter_in_model(config, model, "default")
    with pytest.raises(FastWeightsError, match="of another kind"):
        save_adapter(model, tmp_path / "adapter", base=make_llama())


def test_it_is_written_whole_or_not_at_all(adapter, base_folder, family, monkeypatch):
    model = train(convert(base_folder, KINDS["hybrid"]), PROJECTIONS[family], rank=2)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("fastweights.models.adapters.save_file", full)
        with pytest.raises(FastWeightsError, match="no space left"):
            save_adapter(model, adapter, base=base_folder)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    save_adapter(model, adapter, base=base_folder)
    load_model(adapter)
    with pytest.raises(FastWeightsError, match="has a model in it: give the adapter a folder of its own"):
        save_adapter(model, base_folder, base=base_folder)


def change(adapter, **changes) -> None:
    """Values in the config; `...` takes one out. Names of ours begin with an underscore."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name, value in changes.items():
        part = config["fastweights"] if name.startswith("_") else config
        part[name.removeprefix("_")] = value
        if value is ...:
            del part[name.removeprefix("_")]
    file.write_text(json.dumps(config), encoding="utf-8")


def is_refused(adapter, match: str | None = None) -> None:
    with pytest.raises(FastWeightsError, match=match) as caught:
        load_model(adapter)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.fixture
def damaged(tmp_path):
    """An adapter to damage."""
    make_llama().save_pretrained(tmp_path / "base")
    model = train(convert(tmp_path / "base", KINDS["hybrid"]), PROJECTIONS["llama"])
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[" * 9999])
def test_configs_that_are_no_json_are_refused(damaged, text):
    (damaged / "adapter_config.json").write_text(text, encoding="utf-8")
    is_refused(damaged, r"adapter_config\.json cannot be read")


@pytest.mark.parametrize(
    "wrong",
    [
        {"_format": 2},
        {"_format": ...},
        {"_conversion": "hybrid"},
        {"_conversion": {"window": "8"}},
        {"_conversion": {"none": 1}},
        {"_conversion": {"window": 8, "rule": "none"}},
        {"_conversion": {"window": 8, "value_gate": False}},
        {"_base": ...},
        {"_base": {}},
        {"_sample": {}},
        {"_sample": {"norm.weight": "one two"}},
        {"_sample": 3},
        {"fastweights": None},
        {"fastweights": 3},
        {"r": 0},
        {"r": 3},
        {"r": "4"},
        {"r": ...},
        {"lora_alpha": None},
        {"target_modules": ["model.base.norm"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": []},
        {"target_modules": ...},
        {"target_modules": 3},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)
def test_configs_with_wrong_values_are_refused(damaged, wrong):
    change(damaged, **wrong)
    is_refused(damaged)


def test_a_sample_that_is_cut_off_is_refused(damaged):
    config = json.loads((damaged / "adapter_config.json").read_text(encoding="utf-8"))
    change(damaged, _sample={name: row.split()[0] for name, row in config["fastweights"]["sample"].items()})
    is_refused(damaged, "a sample of its weights that is damaged")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_weights_that_are_cut_off_are_refused(damaged, kept):
    file = damaged / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    is_refused(damaged, "is no whole adapter")


LORA = "base_model.model.model.base.layers.1.self_attn.q_proj.lora_A.weight"
FACTOR = "base_model.model.model.base.layers.1.self_attn.fast_scale"


@pytest.mark.parametrize("name", [LORA, FACTOR])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, name: tensors[name].view(-1)[:1].fill_(math.nan), "not finite"),
        (lambda tensors, name: tensors[name].view(-1)[:1].fill_(math.inf), "not finite"),
        (lambda tensors, name: tensors.pop(name), "have no"),
        (lambda tensors, name: tensors.update(odd=tensors[name].clone()), "have an unknown odd"),
        (lambda tensors, name: tensors.update({name: tensors[name][:2].clone()}), "of shape"),
    ],
    ids=["nan", "inf", "missing", "unknown", "shape"],
)
def test_damaged_weights_are_refused(damaged, name, change, reason):
    file = damaged / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file)
    is_refused(damaged, reason)


def test_weights_that_are_missing_are_refused(damaged):
    (damaged / "adapter_model.safetensors").unlink()
    is_refused(damaged, "is no whole adapter")


def test_an_adapter_of_peft_alone_is_no_model(tmp_path):
    adapted = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match=r"there is no config\.json in"):
            load(tmp_path)
    with pytest.raises(FastWeightsError, match="is no adapter with fast weights"):
        load_adapter(tmp_path)


def test_a_file_beside_an_adapter_is_no_adapter(tmp_path):
    """Such as the .gguf file of its base model."""
    base = make_llama()
    save_adapter(convert(base, ConversionConfig(window=8)), tmp_path, base=base)
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    assert adapter_folder(tmp_path) == tmp_path
    assert adapter_folder(tmp_path / "base.gguf") is None
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match=r"cannot load a .* from .*base\.gguf"):
            load(tmp_path / "base.gguf")
