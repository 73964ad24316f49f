"""A memory: the same as reading everything, of constant size, forkable, refused by other models, safe on disk."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from fastweights.errors import FastWeightsError
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.models import FastWeightsForCausalLM, add_fast_weight_layer, convert
from fastweights.models.cache import layer_tensors
from fastweights.reading.memory import _checksum, fingerprint, load_memory, new_memory
from fastweights.reading.text import token_pieces
from fastweights.settings.conversion import ADDED, ConversionConfig
from tests.conftest import FAMILIES, MAKERS, make_gpt2, make_llama, random_ids
from tests.forks import Forks

KINDS = ["pure", "hybrid", "hybrid of eight bits", "pure + layer", "hybrid + layer"]


def make(kind: str, base=None):
    model = make_gpt2() if base is None else base
    if kind != "layer":
        settings = {"window": 8} if "hybrid" in kind else {}
        settings |= {"window_dtype": "int8"} if "bits" in kind else {}
        model = convert(model, ConversionConfig(positions="drop", **settings))
    if "layer" in kind:
        model = add_fast_weight_layer(model)
        torch.manual_seed(1)
        with torch.no_grad():
            model.fast_weight_layer.output_scale.normal_()
            model.fast_weight_layer.log_step_size.fill_(-5.5)
    return model.eval()


OWN_WINDOWS = ["gemma3_text, pure", "gemma3_text, hybrid", "mistral, layer"]


@pytest.fixture(params=[*(f"{family}, {kind}" for family in MAKERS for kind in KINDS), *OWN_WINDOWS])
def model(request):
    """Two families in every form, and those whose softmax layers have windows of their own."""
    family, kind = request.param.split(", ")
    return make(kind, FAMILIES[family](**({} if family in MAKERS else {"sliding_window": 5})))


ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}


@pytest.mark.parametrize("sizes", [(60,), (1, 2, 30, 27)], ids=str)
def test_goes_on_as_if_it_had_just_read_the_text(model, tmp_path, sizes):
    ids, prompt = random_ids(1, 60)[0], random_ids(1, 5, seed=2)[0]
    memory = new_memory(model).read(ids.split(sizes))
    file = memory.save(tmp_path / "x.memory")
    loaded = load_memory(model, file)
    assert loaded.tokens == 60
    everything = torch.cat((ids, prompt))[None]
    with torch.no_grad():
        expected = model.generate(everything, attention_mask=torch.ones_like(everything), **ARGUMENTS)[0, 65:]
        without = model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **ARGUMENTS)[0, 60:]
    assert loaded.generate(prompt, **ARGUMENTS).tolist() == expected.tolist()
    # generating leaves the memory as it is
    assert loaded.generate(**ARGUMENTS).tolist() == without.tolist()
    assert loaded.generate(num_beams=2, **ARGUMENTS).shape == (12,)
    assert loaded.generate(num_return_sequences=3, **{**ARGUMENTS, "do_sample": True}).shape == (3, 12)


@pytest.mark.parametrize("kind", ["pure", "hybrid of eight bits", "hybrid + layer"])
def test_a_state_in_eight_bits(kind, tmp_path):
    settings = {"window": 8} if "hybrid" in kind else {}
    settings |= {"window_dtype": "int8"} if "bits" in kind else {}
    model = convert(make_llama(), ConversionConfig(state_dtype="int8", rule="gated_delta", **settings))
    model = make("layer", model) if "layer" in kind else model.eval()
    ids = random_ids(1, 60)[0]
    memory = new_memory(model).read(ids.split((2, 30, 28)))
    loaded = load_memory(model, memory.save(tmp_path / "x.memory"))
    assert loaded.size() == memory.size()
    assert loaded.generate(ids[:5], **ARGUMENTS).tolist() == memory.generate(ids[:5], **ARGUMENTS).tolist()
    for held, own in zip(loaded.cache.layers, memory.cache.layers, strict=True):
        held, own = layer_tensors(held), layer_tensors(own)
        assert held.keys() == own.keys()
        assert all(torch.equal(held[name], own[name]) for name in own)
    memory.cache.layers[0].exponents[0, 0, 3] = -128
    with pytest.raises(FastWeightsError, match=r"0\.state0 of the memory is not finite"):
        memory.save(tmp_path / "y.memory")


def test_forks_go_their_own_ways(model):
    memory = new_memory(model).read([random_ids(1, 30)[0]])
    fork = memory.fork().read([random_ids(1, 30, seed=3)[0]])
    alone = new_memory(model).read([random_ids(1, 30)[0]])
    assert (memory.tokens, fork.tokens) == (30, 60)
    assert memory.generate(**ARGUMENTS).tolist() == alone.generate(**ARGUMENTS).tolist()
    both = torch.cat((random_ids(1, 30)[0], random_ids(1, 30, seed=3)[0]))
    assert fork.generate(**ARGUMENTS).tolist() == new_memory(model).read([both]).generate(**ARGUMENTS).tolist()


def test_going_on_reading_from_a_file_equals_reading_at_once(model, tmp_path):
    ids = random_ids(1, 80)[0]
    new_memory(model).read([ids[:33]]).save(tmp_path / "first")
    second = load_memory(model, tmp_path / "first").read([ids[33:]])
    assert second.generate(**ARGUMENTS).tolist() == new_memory(model).read([ids]).generate(**ARGUMENTS).tolist()


def test_its_size_does_not_depend_on_the_text(tmp_path):
    model = make("hybrid + layer")
    short = new_memory(model).read([random_ids(1, 100)[0]])
    long = new_memory(model).read([random_ids(1, 5000)[0]])
    sizes = [memory.save(tmp_path / "x").stat().st_size for memory in (short, long)]
    assert abs(sizes[0] - sizes[1]) < 64  # the header says how long the text was
    assert long.size() == short.size()


def test_reading_takes_constant_memory(tmp_path, tokenizer):
    """Ten times the text, from a file, at the same peak."""
    model, peaks = make("hybrid + layer"), []
    for n in (300, 500, 4_000):  # the first warms the allocator up
        file = tmp_path / "text.txt"
        file.write_text("some words of a text, over and over. " * n)
        with PeakMemory(model.device) as peak:
            new_memory(model).read(piece.ids for piece in token_pieces(file, tokenizer))
        peaks.append(peak.bytes)
    if None in peaks:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert peaks[2] < peaks[1] + 20e6  # keys and values of the long text would take 116 MB


def test_another_model_is_refused(tmp_path):
    file = new_memory(make("hybrid")).read([random_ids(1, 20)[0]]).save(tmp_path / "x")
    changed = make("hybrid")
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-3
    for other in (changed, make("pure"), make("hybrid + layer"), make("hybrid", make_llama())):
        with pytest.raises(FastWeightsError, match="another model"):
            load_memory(other, file)


def test_a_config_that_computes_otherwise_is_another_model():
    from fastweights.reading.memory import fingerprint

    models = [convert(make_llama(), ConversionConfig(rotary=rotary)) for rotary in (True, False)]
    models.append(convert(make_llama(rope_theta=500.0), ConversionConfig()))
    assert len({fingerprint(model) for model in models}) == 3


def test_a_setting_that_came_later_leaves_memories_from_before_to_their_model():
    model = convert(make_llama())
    now = fingerprint(model)
    for name, given in (
        ("value_map", True),
        ("conv_size", 4),
        ("mix_gate", True),
        ("window_dtype", "int8"),
        ("state_dtype", "int8"),
        ("softmax_dtype", "int8"),
    ):
        assert model.config.conversion.pop(name) == ADDED[name]
        assert fingerprint(model) == now
        model.config.conversion[name] = given
        assert fingerprint(model) != now
        model.config.conversion[name] = ADDED[name]


def test_models_without_a_constant_state_are_refused():
    for model in (make_gpt2(), convert(make_gpt2())):
        with pytest.raises(FastWeightsError, match="convert it"):
            new_memory(model)
    with pytest.raises(FastWeightsError, match="convert the model that its Fast Weight Layer was put on"):
        new_memory(add_fast_weight_layer(make_gpt2()))


def test_bad_files(tmp_path):
    model = make("pure")
    with pytest.raises(FastWeightsError, match="fastweights read"):
        load_memory(model, tmp_path / "none")
    whole = new_memory(model).read([random_ids(1, 20)[0]]).save(tmp_path / "x").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FastWeightsError, match="no whole memory"):
        load_memory(model, tmp_path / "cut")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(FastWeightsError, match="no memory file"):
        load_memory(model, tmp_path / "foreign")
    with pytest.raises(FastWeightsError, match="make it first"):
        new_memory(model).save(tmp_path / "missing" / "x")
    with pytest.raises(FastWeightsError, match="is a folder"):
        new_memory(model).save(tmp_path)
    with pytest.raises(FastWeightsError, match="nothing to go on from"):
        new_memory(model).generate()


def test_a_model_from_before_factors_had_units_is_the_same_with_units_of_one():
    model = convert(make_gpt2())
    now = fingerprint(model)
    layer = model.fast_attentions()[0]
    units = layer._buffers.pop("fast_unit")
    assert fingerprint(model) == now
    layer._buffers["fast_unit"] = 2 * units
    assert fingerprint(model) != now


def test_what_does_not_compute_does_not_tell_models_apart(tmp_path):
    model = make("pure")
    before = fingerprint(model)
    for config in (model.config, model.config.base):
        config.pad_token_id, config.use_cache = 5, False
    assert fingerprint(model) == before
    model.config.gate_bias = [0.0, 1.0]
    assert fingerprint(model) != before


def test_reading_that_was_interrupted_left_what_was_read(monkeypatch):
    model = make("pure")
    ids = random_ids(1, 60)[0]
    memory, other = new_memory(model).read([ids[:20]]), new_memory(model).read([ids[:20]])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.read([ids[20:40]])
    assert (memory.tokens, memory.last_token) == (other.tokens, other.last_token)
    assert memory.generate(**ARGUMENTS).tolist() == other.generate(**ARGUMENTS).tolist()


def test_a_memory_that_is_not_finite_is_not_saved(tmp_path):
    model = make("pure")
    memory = new_memory(model).read([torch.tensor([5, 7, 5])])
    memory.cache.layers[0].state()[0, 0, 0] = math.nan
    with pytest.raises(FastWeightsError, match="not finite, and nothing was saved"):
        memory.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_reading_stops_where_the_model_predicts_nothing():
    model = make("pure", make_llama())
    model.get_input_embeddings().weight[7] = math.nan
    memory = new_memory(model).read([torch.tensor([5, 6])])
    with pytest.raises(FastWeightsError, match="logits are not finite"):
        memory.read([torch.tensor([5, 7, 5])])


@torch.no_grad()
def test_a_memory_whose_reading_ended_by_an_error_is_not_saved(tmp_path):
    """Its state may be finite, and ahead of what it says was read."""
    model = make("pure", make_llama())
    memory = new_memory(model).read([torch.tensor([5, 6])])
    norm = model.model.base.norm.weight
    whole = norm.clone()
    norm.fill_(math.inf)
    with pytest.raises(FastWeightsError, match="logits are not finite"):
        memory.read([torch.tensor([5, 7, 5])])
    norm.copy_(whole)
    memory.read([torch.tensor([8, 9])])
    with pytest.raises(FastWeightsError, match="reading ended by an error, and nothing was saved"):
        memory.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model = make("hybrid + layer")
    memory, prompt = new_memory(model).read([random_ids(1, 30)[0]]), random_ids(1, 50, seed=2)[0]
    at_once = memory.generate(prompt, **ARGUMENTS)
    monkeypatch.setattr("fastweights.reading.generation.PIECE", 8)
    longest, forward = [], model.forward

    def counted(*args, **kwargs):
        longest.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    assert memory.generate(prompt, **ARGUMENTS).tolist() == at_once.tolist()
    assert max(longest) == 8


def test_places_that_cannot_be_written_or_read_are_refused(tmp_path, monkeypatch):
    model = make("pure")
    memory = new_memory(model).read([random_ids(1, 20)[0]])
    file = memory.save(tmp_path / "x")
    with pytest.raises(FastWeightsError, match="is a folder"):
        load_memory(model, tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FastWeightsError, match="may not be written to"):
        memory.save(tmp_path / "y")
    with pytest.raises(FastWeightsError, match="may not be read"):
        load_memory(model, file)


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    model = make("pure")
    file = new_memory(model).read([random_ids(1, 20)[0]]).save(tmp_path / "x")
    before = file.read_bytes()

    def full(path, data):
        with open(path, "wb") as out:
            out.write(data[:100])
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(FastWeightsError, match=r"cannot write .*no space left"):
        new_memory(model).read([random_ids(1, 50)[0]]).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def small() -> FastWeightsForCausalLM:
    return make("hybrid + layer", make_gpt2(n_layer=1))


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> bytes:
    return new_memory(small).read([random_ids(1, 20)[0]]).save(tmp_path_factory.mktemp("memory") / "x").read_bytes()


def refusal(model, path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(FastWeightsError) as caught:
        load_memory(model, path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def header_of(saved: bytes) -> int:
    return 8 + int.from_bytes(saved[:8], "little")


def test_one_flipped_bit_is_noticed(small, saved, tmp_path):
    header = header_of(saved)
    for place in [*range(header), *range(header, len(saved), 397), len(saved) - 1]:
        damaged = bytearray(saved)
        damaged[place] ^= 1 << place % 8
        refusal(small, tmp_path / "x", bytes(damaged))


def test_a_file_that_is_cut_off_is_noticed(small, saved, tmp_path):
    header = header_of(saved)
    for length in [*range(12), *range(12, header, 7), *range(header, len(saved), 997), len(saved) - 1]:
        refusal(small, tmp_path / "x", saved[:length])
    refusal(small, tmp_path / "x", saved + b"\0")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"garbage, and more of it than eight bytes",
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (10).to_bytes(8, "little") + b"[" * 10,
        (10**5).to_bytes(8, "little") + b'{"a":' * 20000,
        (66).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets"'
        + b":[0,4]}}",
        (59).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}',
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_what_is_no_memory_is_refused(small, tmp_path, content):
    assert re.search("no whole memory|no memory file", refusal(small, tmp_path / "x", content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"0.state0": None}, "has not what its model remembers, such as 0.state0"),
        ({"0.keys": None}, "has not what its model remembers, such as 0.keys"),
        ({"7.state0": torch.zeros(1)}, "such as 7.state0"),
        ({"0.real": torch.ones(1, 7, dtype=torch.bool)}, "such as 0.real"),
        ({"0.state0": torch.zeros(1, 2, 16, 15)}, "0.state0 in .* shape and type"),
        ({"0.state0": torch.zeros(1, 2, 16, 16, dtype=torch.float16)}, "0.state0 in .* shape and type"),
        ({"0.values": torch.zeros(1, 2, 6, 16)}, "0.values in .* shape and type"),
        ({"0.state0": torch.full((1, 2, 16, 16), math.nan)}, "0.state0 in .* not finite"),
        ({"0.state0": torch.full((1, 2, 16, 16), -math.inf)}, "0.state0 in .* not finite"),
        ({"tokens": None}, "does not say what was read"),
        ({"tokens": "many"}, "does not say what was read"),
        ({"tokens": "[" * 100_000}, "does not say what was read"),
        ({"tokens": "20.0"}, "no number of tokens that can be"),
        ({"tokens": "true"}, "no number of tokens that can be"),
        ({"tokens": "-1"}, "no number of tokens that can be"),
        ({"tokens": str(2**64)}, "no number of tokens that can be"),
        ({"tokens": "1"}, "has not what its model remembers"),
        ({"tokens": "3"}, "0.keys in .* shape and type"),
        ({"last_token": "257"}, "a token that its model does not have"),
        ({"last_token": "-1"}, "a token that its model does not have"),
        ({"last_token": "null"}, "a token that its model does not have"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_memory_that_its_model_would_not_make_is_refused(small, saved, tmp_path, change, reason):
    """One whose checksum is right."""
    (tmp_path / "x").write_bytes(saved)
    with safe_open(tmp_path / "x", framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del about["checksum"]
    for name, value in change.items():
        part: dict = about if name in about else tensors
        part[name] = value
        if value is None:
            del part[name]
    whole = save(tensors, about | {"checksum": _checksum(tensors, about)})
    assert re.search(reason, refusal(small, tmp_path / "x", whole))


@pytest.mark.parametrize("rotary", [True, False])
def test_a_memory_from_when_keys_were_kept_twice_goes_on(tmp_path, rotary):
    model = convert(make_llama(), ConversionConfig(window=8, rotary=rotary)).eval()
    memory, prompt = new_memory(model).read([random_ids(1, 20)[0]]), random_ids(1, 5, seed=2)[0]
    with safe_open(memory.save(tmp_path / "x"), framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del about["checksum"]
    about["format"] = "fastweights-memory-6"
    for name in [name for name in tensors if name.endswith(".keys") and not rotary]:
        tensors[name] = torch.cat((tensors[name], torch.randn_like(tensors[name])), -1)
    save_file(tensors, tmp_path / "old", about | {"checksum": _checksum(tensors, about)})
    loaded = load_memory(model, tmp_path / "old")
    assert loaded.generate(prompt, **ARGUMENTS).equal(memory.generate(prompt, **ARGUMENTS))


def test_a_memory_of_an_earlier_format_is_refused(small, tmp_path):
    old = save({"0.state0": torch.zeros(1)}, {"format": "fastweights-memory-3", "tokens": "3"})
    assert "no memory file of this version" in refusal(small, tmp_path / "x", old)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9])
def test_short_texts_are_remembered(model, tmp_path, tokens):
    ids = random_ids(1, tokens)[0]
    loaded = load_memory(model, new_memory(model).read([ids]).save(tmp_path / "x"))
    assert (loaded.tokens, loaded.last_token) == (tokens, int(ids[-1]) if tokens else None)
    assert loaded.cache.lengths() == new_memory(model).read([ids]).cache.lengths()


def test_a_memory_does_not_change_with_its_file(small, saved, tmp_path):
    file = tmp_path / "x"
    file.write_bytes(saved)
    loaded = load_memory(small, file)
    with open(file, "r+b") as out:
        out.write(b"\0" * len(saved))
    assert all(state.any() for state in loaded.cache.layers[0].recurrent_states.values())


_SAVES = """
import sys, torch
from pathlib import Path
from tests.reading.test_memory import make
from tests.conftest import random_ids
from fastweights.reading.memory import new_memory
model = make("hybrid + layer")
memory = new_memory(model).read([random_ids(1, 50)[0]])
memory.save(sys.argv[1])
print("saved", flush=True)
while True:
    memory.save(sys.argv[1])
"""


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    file = tmp_path / "x.memory"
    model = make("hybrid + layer")
    with Forks() as forks:
        for _ in range(2):
            process = forks.start(file, code=_SAVES)
            while "saved" not in process.out.read_text():
                os.kill(process.pid, 0)  # it runs
                time.sleep(0.01)
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait().returncode == -signal.SIGKILL
            assert load_memory(model, file).tokens == 50
