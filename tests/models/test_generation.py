"""The cases of transformers' GenerationTesterMixin, which is in none of its packages, on converted models."""

from __future__ import annotations

import pytest
import torch

from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import make_llama, random_ids
from tests.ops.problems import error

KINDS = {
    "pure": ConversionConfig(),
    "hybrid": ConversionConfig(window=4),
    "mixed": ConversionConfig(window=4, layer_types=["linear_attention", "full_attention", "hybrid_sliding"]),
}
PLAIN = {"eos_token_id": None, "pad_token_id": 256}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 2, "length_penalty": 2.0},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 10},
}
SEVERAL = {"sampling": 2, "beams": 2, "sampled beams": 2}


@pytest.fixture(params=sorted(KINDS))
def model(base, request):
    return convert(base, KINDS[request.param]).eval()


def generate(model, ids, **arguments):
    torch.manual_seed(0)
    mask = arguments.pop("attention_mask", None if ids is None else torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 6, "do_sample": False, **PLAIN, **arguments})


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_returned(model, way):
    ids, rows = random_ids(2, 9), 2 * SEVERAL.get(way, 1)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked |= {"output_hidden_states": True, "num_return_sequences": rows // 2, "remove_invalid_values": True}
    outputs = [generate(model, ids, use_cache=use_cache, **asked, **WAYS[way]) for use_cache in (True, False)]
    for output, lengths in zip(outputs, ([9, 1, 1, 1, 1, 1], [9, 10, 11, 12, 13, 14]), strict=True):
        assert output.sequences.shape == (rows, 15)
        assert output.sequences[:, :9].equal(ids.repeat_interleave(rows // 2, 0))
        read = 4 if "beams" in way else rows
        assert [score.shape for score in output.scores] == [(read, 257)] * 6
        assert [logits.shape for logits in output.logits] == [(read, 257)] * 6
        assert [step[-1].shape[1] for step in output.hidden_states] == lengths
        assert all(len(step) == 4 for step in output.hidden_states)
    assert outputs[0].sequences.equal(outputs[1].sequences)
    assert outputs[0].cache.get_seq_length() == 14
    assert outputs[1].cache is None


def test_processors(model):
    ids = random_ids(2, 9)
    plain = generate(model, ids)[:, 9:]
    banned = [[int(plain[0, 0])]]
    found = generate(model, ids, bad_words_ids=banned, no_repeat_ngram_size=2, repetition_penalty=1.2)[:, 9:]
    assert banned[0][0] not in found
    assert generate(model, ids, max_new_tokens=9, min_new_tokens=7, eos_token_id=int(plain[0, 1])).shape[1] >= 16


def test_without_input_ids(model):
    assert generate(model, None, bos_token_id=3).tolist() == generate(model, torch.tensor([[3]])).tolist()


@pytest.mark.parametrize("beams", [1, 2])
def test_from_embeddings(model, beams):
    ids = random_ids(2, 9)
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    expected = generate(model, ids, num_beams=beams)[:, 9:]
    found = generate(model, None, inputs_embeds=embedded, attention_mask=mask, num_beams=beams)
    assert found.equal(expected)
    both = generate(model, ids, inputs_embeds=embedded, num_beams=beams)
    assert both[:, 9:].equal(expected)
    other = generate(model, None, inputs_embeds=embedded.flip(1), attention_mask=mask, num_beams=beams)
    assert not other.equal(expected)


def test_going_on_from_what_was_returned(model):
    ids = random_ids(2, 9)
    whole = generate(model, ids, max_new_tokens=10)
    output = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    mask = torch.ones_like(output.sequences)
    on = generate(
        model,
        output.sequences,
        attention_mask=mask,
        cache=output.cache,
        return_dict_in_generate=True,
    )
    assert on.sequences.equal(whole)
    assert on.cache.get_seq_length() == 18


def test_going_on_with_several_new_tokens(model):
    ids = random_ids(2, 20)
    output = generate(model, ids[:, :9], max_new_tokens=1, return_dict_in_generate=True)
    assert output.cache.get_seq_length() == 9
    assert generate(model, ids, cache=output.cache).equal(generate(model, ids))


def test_the_last_logits_are_enough(model):
    ids = random_ids(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        for kept in (1, 3, torch.tensor([2, 5])):
            index = slice(-kept, None) if isinstance(kept, int) else kept
            assert error(model(ids, logits_to_keep=kept).logits, whole[:, index]) <= tolerances.FLOAT32
    assert generate(model, ids, logits_to_keep=0).equal(generate(model, ids))


def test_a_prompt_in_pieces(model):
    ids = random_ids(2, 20)
    assert generate(model, ids, prefill_chunk_size=6).equal(generate(model, ids))


def test_left_padding(model):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    padded = torch.cat((torch.full((2, 5), 256), ids), 1)
    found = generate(model, padded, attention_mask=torch.nn.functional.pad(mask, (5, 0)))
    assert found[:, 25:].equal(generate(model, ids)[:, 20:])


def test_it_stops_when_time_is_up(model):
    assert generate(model, random_ids(1, 9), max_time=0.0).shape[1] == 10


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_what_needs_to_take_tokens_back_is_refused(way):
    model, ids = convert(make_llama(), KINDS["pure"]), random_ids(1, 9)
    arguments = {"assistant_model": make_llama()} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids, **arguments)


@torch.no_grad()
@pytest.mark.parametrize(
    "types", [None, ["linear_attention", "full_attention", "hybrid_sliding"]], ids=["hybrid", "mixed"]
)
def test_a_padded_prompt_read_in_pieces(base, types):
    """The first piece of the shorter row is padding alone."""
    model = convert(base, ConversionConfig(window=8, layer_types=types)).eval()
    ids = torch.cat((torch.cat((torch.full((1, 8), 256), random_ids(1, 12)), 1), random_ids(1, 20, seed=1)))
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    arguments["attention_mask"] = (ids != 256).long()
    whole, pieces = (model.generate(ids, **arguments, **more) for more in ({}, {"prefill_chunk_size": 3}))
    assert whole.tolist() == pieces.tolist()
