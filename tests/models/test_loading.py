"""Models by name: no code of strangers, no damaged weights, and a wrong name is said at once."""

from __future__ import annotations

import json
import math
import shutil
import time

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import convert, load_model
from fastweights.models.loading import check_apart, load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, random_ids
from tests.forks import Forks

_OURS = """
from pathlib import Path
Path({mark!r}).write_text("ran", encoding="utf-8")
from transformers import GPT2Config as Config, GPT2LMHeadModel as Model, PreTrainedTokenizerFast as Tokenizer
"""
_MAPS = {
    "config.json": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
}


@pytest.fixture
def folder(tmp_path, model_folder):
    """A model's folder to damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def change(file, **changes) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}), encoding="utf-8")


@pytest.fixture(scope="module")
def trusting():
    """Where processes begin whose user trusts code from anywhere."""
    with Forks(FASTWEIGHTS_TRUST_REMOTE_CODE="1", HF_TRUST_REMOTE_CODE="1", TRUST_REMOTE_CODE="1") as forks:
        yield forks


@pytest.mark.parametrize("known", [True, False], ids=["known family", "unknown family"])
@pytest.mark.parametrize("file", sorted(_MAPS))
def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path, trusting, file, known):
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(_OURS.format(mark=str(mark)), encoding="utf-8")
    unknown = {"model_type": "stranger"} if file == "config.json" else {"tokenizer_class": "StrangerTokenizer"}
    change(folder / file, auto_map=_MAPS[file], **({} if known else unknown))
    done = trusting.run("generate", folder, "--prompt", "a", "--max-new-tokens", 2, given="y\n" * 9)
    assert not mark.exists()
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert not known
        assert done.stderr.splitlines()[-1].startswith("error: ")


def test_attention_by_code_from_the_hub_is_never_fetched(folder):
    change(folder / "config.json", attn_implementation="kernels-community/flash-attn")
    with pytest.raises(FastWeightsError, match="code from the hub"):
        load_model(folder)
    change(folder / "config.json", attn_implementation="eager")
    load_model(folder)


def test_a_model_with_an_adapter_beside_it_is_refused(folder, tmp_path):
    """Converted and saved, it would be a folder that cannot be loaded."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_model(folder), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(FastWeightsError, match="merge"):
        convert(folder)


def test_an_unknown_family_with_code_gets_one_line(folder):
    (folder / "code.py").write_text("raise SystemExit", encoding="utf-8")
    change(folder / "config.json", auto_map=_MAPS["config.json"], model_type="stranger")
    with pytest.raises(FastWeightsError, match="never run"):
        load_model(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastWeightsError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight .* is not finite"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_weights_that_are_cut_off_are_refused(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert is_refused(load_model, folder)


def test_a_model_from_before_factors_had_units_has_units_of_one(tmp_path):
    convert(make_gpt2()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    old = {name: x for name, x in weights.items() if "fast_unit" not in name}
    assert old.keys() < weights.keys()
    save_file(old, file, metadata={"format": "pt"})
    assert all(layer.fast_unit.eq(1).all() for layer in load_model(tmp_path).fast_attentions())


def is_refused(load, folder) -> bool:
    try:
        load(folder)
    except FastWeightsError as error:
        line = str(error)
    else:
        return False
    assert "\n" not in line
    assert len(line) < 500
    return True


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"gpt2"', "null", "{}", '{"model_type": 5}', '{"model_type": []}', "\x00\xff", "[" * 9999],
)
def test_configs_that_are_none_are_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert is_refused(load_model, folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_embd": "wide"},
        {"n_embd": -4},
        {"n_embd": 33},
        {"n_head": 0},
        {"n_layer": "3"},
        {"n_layer": 2},
        {"vocab_size": 100},
        {"vocab_size": None},
        {"n_positions": [128]},
        {"activation_function": "none such"},
        {"layer_norm_epsilon": "small"},
        {"quantization_config": {"quant_method": "none such"}},
        {"dtype": "none such"},
    ],
    ids=str,
)
def test_configs_with_wrong_values_are_refused_or_do_no_harm(folder, wrong):
    change(folder / "config.json", **wrong)
    harmless = {"n_layer", "dtype", "quantization_config", "layer_norm_epsilon"}
    assert is_refused(load_model, folder) or set(wrong) <= harmless


@pytest.mark.parametrize(
    "wrong",
    [
        {"conversion": "hybrid"},
        {"conversion": {"window": "8"}},
        {"conversion": {"none": 1}},
        {"base_config": 3},
        {"base_config": ...},
        {"fast_weight_layer": {"blocks": "x"}},
    ],
    ids=str,
)
def test_our_own_configs_with_wrong_values_are_refused(tmp_path, wrong):
    convert(make_gpt2()).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **wrong)
    assert is_refused(load_model, tmp_path)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("conversion", {"conv_size": 2.5}),
        ("conversion", {"gate_rank": None}),
        ("conversion", {"window": "8"}),
        ("conversion", {"window": 8, "sinks": 2.5}),
        ("conversion", {"window": 8, "windows": [8, 8.5, 8]}),
        ("fast_weight_layer", {"segment": 0.5}),
    ],
    ids=str,
)
def test_fractions_of_what_is_counted_are_refused(tmp_path, part, wrong):
    convert(make_gpt2()).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **{part: wrong})
    with pytest.raises(FastWeightsError, match=rf"{list(wrong)[-1]} is .*; it must be a whole number"):
        load_model(tmp_path)


def test_whole_numbers_may_come_as_floats(tmp_path):
    """As some programs write JSON."""
    convert(make_gpt2(), ConversionConfig(window=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path / "config.json", conversion={**config["conversion"], "window": 8.0, "windows": [8.0, 8, 8.0]})
    model = load_model(tmp_path)
    assert model.config.settings.windows == [8, 8, 8]
    model.generate(random_ids(1, 12), max_new_tokens=2)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match="tokens up to 258, and the model a vocabulary of 257"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_damaged_tokenizers_get_one_line(folder, file, text):
    (folder / file).write_text(text, encoding="utf-8")
    assert is_refused(load_tokenizer, folder) or file == "tokenizer_config.json"


def test_what_is_no_model_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fastweights.models.loading.ask_hub", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "file.txt").touch()
    for source, reason in (
        (tmp_path, "no config.json in"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "file.txt", "is no folder"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("no name", "does not exist"),
        ("none.gguf", "does not exist"),
        ("x" * 300, "does not exist"),
        ("a\0b", "does not exist"),
        ("", "does not exist"),
    ):
        for load in (load_model, load_tokenizer):
            with pytest.raises(FastWeightsError, match=reason):
                load(source)
    with pytest.raises(FastWeightsError, match=r"no none\.gguf in"):
        load_model(tmp_path, gguf_file="none.gguf")


def test_the_embedded_model_goes_by_its_name(monkeypatch):
    monkeypatch.setattr("fastweights.models.loading.ask_hub", lambda *_: pytest.fail("the hub was asked"))
    assert convert("embedded").config.vocab_size == len(load_tokenizer("embedded"))


def test_a_name_that_the_hub_cannot_be_asked_for_takes_seconds(monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(60)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", slow)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
    start = time.perf_counter()
    with pytest.raises(FastWeightsError, match=r"no folder owner/name, and .* cannot be reached within 0.2 seconds"):
        load_model("owner/name")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no\nnetwork"), r"cannot be reached \(no\)"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_name_that_is_neither_a_folder_nor_to_be_had_says_both(monkeypatch, error, reason):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fails)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastWeightsError, match=f"there is no folder modle, and the Hugging Face hub .*{reason}"):
            load("modle")


def test_what_was_downloaded_earlier_is_loaded_without_a_network(monkeypatch, tmp_path, model_folder):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(model_folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    assert load_model("owner/name").config.n_layer == 3


def test_a_model_is_not_written_over_or_around_itself(tmp_path, folder):
    inside = tmp_path / "model.gguf"
    inside.touch()
    for source, output in ((folder, folder), (folder, tmp_path), (inside, tmp_path), (folder, folder / ".." / "model")):
        with pytest.raises(FastWeightsError, match="stays as it is"):
            check_apart(source, output)
    check_apart(folder, tmp_path / "other")
    check_apart(folder, folder / "converted")
