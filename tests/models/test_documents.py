"""Documents packed into one row do not see each other, however their borders are given."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.cache import FastWeightsCache
from fastweights.models.documents import read_tokens
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import make_gemma3, make_gpt2, make_llama, make_mistral, make_qwen3, random_ids
from tests.models.test_fast_weight_layer import trained
from tests.ops.problems import error

LENGTHS = (9, 1, 17, 6)
KINDS = {
    "pure": ConversionConfig(),
    "hybrid": ConversionConfig(window=8),
    "add": ConversionConfig(rule="add", feature_map="elu+1", window=5),
    "cosformer": ConversionConfig(feature_map="cosformer", window=5),
    "gated": ConversionConfig(rule="gated", feature_map="relu"),
    "mixed": ConversionConfig(window=8, layer_types=["linear_attention", "full_attention", "hybrid_sliding"]),
    "softmax": ConversionConfig(layer_types=["full_attention"] * 3),
}
_LOCAL = ["full_attention", "sliding_attention", "full_attention"]


@pytest.fixture(params=sorted(KINDS))
def model(base, request):
    return convert(base, KINDS[request.param]).eval()


def packed() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The documents, all in one row, and their positions."""
    documents = [random_ids(1, n, seed=i) for i, n in enumerate(LENGTHS)]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(n) for n in LENGTHS])[None]


def borders(positions: torch.Tensor) -> dict[str, dict]:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 17, "max_length_k": 17}
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None].int()
    return {"position_ids": {"position_ids": positions}, "cu_seq_lens": lengths, "seq_idx": {"seq_idx": numbers}}


@torch.no_grad()
@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_document_is_what_it_is_alone(model, way, use_cache):
    documents, row, positions = packed()
    together = model(row, use_cache=use_cache, **borders(positions)[way]).logits
    for document, found in zip(documents, together.split(LENGTHS, 1), strict=True):
        assert error(found, model(document).logits) <= tolerances.FLOAT32


@torch.no_grad()
def test_another_first_document_changes_nothing_in_the_second(model):
    _, row, positions = packed()
    other = row.clone()
    other[:, :9] = random_ids(1, 9, seed=99)
    first, second = (model(ids, position_ids=positions).logits[:, 9:] for ids in (row, other))
    assert torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "pure", "hybrid"])
def test_a_fast_weight_layer_starts_anew_too(base, kind):
    model = trained(base, kind, segment=5)
    documents, row, positions = packed()
    rows = torch.cat((row, random_ids(1, 33, seed=7)))  # beside a row that is one document
    positions = torch.cat((positions, torch.arange(33)[None]))
    together = model(rows, position_ids=positions).logits
    for document, found in zip(documents, together[:1].split(LENGTHS, 1), strict=True):
        assert error(found, model(document).logits) <= tolerances.FLOAT32
    assert error(together[1:], model(rows[1:]).logits) <= tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pure", "hybrid", "add"])
@pytest.mark.parametrize("block", [False, True])
def test_the_last_document_goes_on_in_the_next_call(base, kind, block):
    model = convert(base, KINDS[kind]).eval()
    if block:
        model = add_fast_weight_layer(model).eval()
        torch.nn.init.normal_(model.fast_weight_layer.output_scale)
    documents, row, positions = packed()
    cache = DynamicCache(config=model.config)
    model(row, position_ids=positions, cache=cache)
    more = random_ids(1, 5, seed=50)
    found = model(more, position_ids=torch.arange(6, 11)[None], cache=cache).logits
    assert error(found, model(torch.cat((documents[-1], more), 1)).logits[:, -5:]) <= tolerances.FLOAT32
    found = model(more, position_ids=torch.arange(5)[None], cache=cache).logits  # and here one begins
    assert error(found, model(more).logits) <= tolerances.FLOAT32


OWN_WINDOWS = {
    "gemma3, pure": (make_gemma3, ConversionConfig()),
    "gemma3, hybrid": (make_gemma3, ConversionConfig(window=8)),
    "mistral": (make_mistral, ConversionConfig(layers="none")),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OWN_WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_with_windows_of_their_own_go_on_after_several_documents(kind, padded):
    """In pieces, in rows with borders at different places, which change theirs."""
    make, settings = OWN_WINDOWS[kind]
    model = convert(make(sliding_window=5), settings).eval()
    _, row, positions = packed()
    ids = torch.cat((row, random_ids(1, 33, seed=7)))
    positions = torch.cat((positions, torch.cat((torch.arange(20), torch.arange(13)))[None]))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 11:13] = mask[1, 26] = mask[1, 32] = 0
    whole = model(ids, position_ids=positions, attention_mask=mask).logits
    for cache in (FastWeightsCache(model.config), DynamicCache(config=model.config)):
        at, order = 0, torch.arange(2)
        for size in (3, 5, 1, 1, 10, 2, 11):
            of, told = slice(at, at + size), {"attention_mask": mask[order, : at + size], "cache": cache}
            found = model(ids[order, of], position_ids=positions[order, of], **told).logits
            real = mask[order, of].bool()
            assert error(found[real], whole[order, of][real]) <= tolerances.FLOAT32
            at += size
            cache.reorder_cache(torch.tensor([1, 0]))
            order = order.flip(0)


@torch.no_grad()
@pytest.mark.parametrize("kind", OWN_WINDOWS)
def test_documents_begin_after_what_a_cache_is_not_said_to_hold(kind):
    make, settings = OWN_WINDOWS[kind]
    model = convert(make(sliding_window=5), settings).eval()
    ids, cache = random_ids(1, 30), FastWeightsCache(model.config)
    starts = torch.zeros(1, 22, dtype=torch.bool)
    starts[0, 9] = True
    model(ids[:, :8], cache=cache)
    cache.begin_here()
    found = model(ids[:, 8:], document_starts=starts, cache=cache).logits
    assert error(found[:, :9], model(ids[:, :17]).logits[:, 8:]) <= tolerances.FLOAT32
    assert error(found[:, 9:], model(ids[:, 17:]).logits) <= tolerances.FLOAT32


@torch.no_grad()
def test_softmax_layers_do_not_go_on_after_several_documents(base):
    model = convert(base, KINDS["mixed"]).eval()
    _, row, positions = packed()
    cache = DynamicCache(config=model.config)
    model(row, position_ids=positions, cache=cache)
    with pytest.raises(FastWeightsError, match="cannot go on after that"):
        model(random_ids(1, 1), position_ids=torch.tensor([[6]]), cache=cache)
    cache = DynamicCache(config=model.config)
    model(row, cache=cache)
    with pytest.raises(FastWeightsError, match="cannot go on after that"):
        model(row, position_ids=positions, cache=cache)
    more = random_ids(1, 3, seed=5)  # what was refused was not read
    found = model(more, cache=cache).logits
    assert error(found, model(torch.cat((row, more), 1)).logits[:, -3:]) <= tolerances.FLOAT32


@torch.no_grad()
def test_softmax_layers_with_windows_of_their_own_tell_documents_apart():
    softmax = KINDS["softmax"]
    some = make_qwen3(layer_types=_LOCAL, use_sliding_window=True, sliding_window=4)
    for base, conversion in ((some, None), (some, softmax), (make_mistral(sliding_window=4), softmax)):
        model = convert(base, conversion).eval()
        documents, row, positions = packed()
        together = model(row, position_ids=positions).logits
        for document, found in zip(documents, together.split(LENGTHS, 1), strict=True):
            assert error(found, model(document).logits) <= tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hybrid", "mixed"])
def test_padding_among_documents(base, kind):
    model = convert(base, KINDS[kind]).eval()
    documents, row, positions = packed()
    ids = torch.cat((torch.full((1, 3), 256), row[:, :12], torch.full((1, 2), 256), row[:, 12:]), 1)
    places = torch.cat((torch.zeros(1, 3), positions[:, :12], torch.zeros(1, 2), positions[:, 12:]), 1).long()
    mask = (ids != 256).long()
    together = model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()][None]
    for document, found in zip(documents, together.split(LENGTHS, 1), strict=True):
        assert error(found, model(document).logits) <= tolerances.FLOAT32


def test_gradients_do_not_cross_borders(model):
    _, row, positions = packed()
    embedded = model.get_input_embeddings()(row).detach().requires_grad_()
    model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[:, 10:27].square().sum().backward()
    norms = embedded.grad[0].norm(dim=-1)
    assert norms.isfinite().all()
    assert norms[:10].max() == 0
    assert norms[10:27].min() > 0
    assert norms[27:].max() == 0


@torch.no_grad()
def test_what_transformers_own_collator_makes(base):
    """Padding-free batches of TRL and others."""
    model = convert(base, KINDS["hybrid"]).eval()
    features = [{"input_ids": random_ids(1, n, seed=n)[0].tolist()} for n in (7, 12)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(features)
    labels = batch["labels"].clone()
    loss = model(**batch).loss
    alone = [torch.tensor(feature["input_ids"])[None] for feature in features]
    expected = sum(model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in alone) / 17
    assert (labels == -100).sum() == 2  # the collator leaves out what the first token of each would be predicted from
    torch.testing.assert_close(loss, expected)


def test_bounds_are_of_a_single_row():
    model = convert(make_llama(), KINDS["pure"])
    with pytest.raises(FastWeightsError, match="cu_seq_lens was given with 2 rows"):
        model(random_ids(2, 10), cu_seq_lens_q=torch.tensor([0, 4, 10]))


@pytest.mark.parametrize(
    ("positions", "mask", "past", "expected"),
    [
        ([0, 1, 2, 3], None, 0, []),
        ([5, 6, 7, 8], None, 0, []),  # a row may begin anywhere
        ([0, 1, 0, 1], None, 0, [2]),
        ([3, 4, 0, 0], None, 9, [2, 3]),
        ([0, 1, 2, 3], None, 9, [0]),
        ([0, 0, 0, 1], [0, 0, 1, 1], 0, []),  # padding on the left
        ([0, 1, 1, 1], [1, 1, 0, 0], 0, []),  # and on the right
        ([0, 1, 1, 2], [1, 1, 0, 1], 0, []),  # and in between
        ([0, 1, 0, 0], [1, 1, 0, 1], 0, [3]),
        ([1, 1, 0, 1], [0, 0, 0, 0, 1, 1], 2, []),  # nothing but padding was read
        ([1, 1, 0, 1], [0, 1, 0, 0, 1, 1], 2, [2]),  # and here a document was
        ([1, 1, 5, 6], [0, 1, 0, 0, 1, 1], 2, []),
    ],
)
def test_where_documents_begin(positions, mask, past, expected):
    mask = None if mask is None else torch.tensor([mask])
    cache = FastWeightsCache(convert(make_llama()).config)
    cache.set_lengths([past] * 3)
    reading = read_tokens((1, 4), cache, attention_mask=mask, position_ids=torch.tensor([positions]))
    starts = reading.marks.starts
    assert ([] if starts is None else starts[0].nonzero().flatten().tolist()) == expected


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_a_document_after_padding_in_a_later_piece(base, kind):
    model = convert(base, KINDS[kind]).eval()
    cache = model(random_ids(1, 5), use_cache=True).cache
    more, mask = random_ids(1, 7, seed=1), torch.tensor([[1] * 5 + [0, 0] + [1] * 7])
    ids, positions = torch.cat((torch.full((1, 2), 256), more), 1), torch.tensor([[0, 0, *range(7)]])
    found = model(ids, attention_mask=mask, position_ids=positions, cache=cache).logits[:, 2:]
    assert error(found, model(more).logits) <= tolerances.FLOAT32


@pytest.mark.parametrize("bounds", [[0, 5], [3, 8, 12], [0, 8, 5, 12], [0, 5, 40]], ids=str)
def test_bounds_that_are_not_those_of_the_tokens_are_refused(bounds):
    model = convert(make_llama(), KINDS["pure"])
    with pytest.raises(FastWeightsError, match=r"cu_seq_lens is .* must start with 0"):
        model(random_ids(1, 12), cu_seq_lens_q=torch.tensor(bounds))


def test_bounds_under_other_names_are_refused():
    model = convert(make_llama(), KINDS["pure"])
    for name in ("cu_seqlens", "cu_seq_lens_k"):
        with pytest.raises(FastWeightsError, match="without cu_seq_lens_q"):
            model(random_ids(1, 12), **{name: torch.tensor([0, 4, 12])})
    with pytest.raises(FastWeightsError, match=r"seq_idx is of shape \(1, 12\)"):
        model(random_ids(2, 12), seq_idx=torch.zeros(1, 12).int())


@torch.no_grad()
def test_what_only_positions_can_say(model):
    """After other tokens, bounds and numbers say nothing of them; after several documents, neither does a length."""
    _, row, positions = packed()
    if "full_attention" not in model.config.layer_types:
        cache = model(row, use_cache=True).cache
        for way in ("cu_seq_lens", "seq_idx"):
            with pytest.raises(FastWeightsError, match="give position_ids, which start anew"):
                model(row, cache=cache, **borders(positions)[way])
    cache = model(row, use_cache=True, **borders(positions)["cu_seq_lens"]).cache
    with pytest.raises(FastWeightsError, match="were several documents: give position_ids"):
        model(row[:, :1], cache=cache)


@torch.no_grad()
def test_rows_that_are_told_to_begin(base):
    """As in training, where the block goes on from piece to piece above a softmax model that starts anew."""
    model = trained(base, "softmax")
    ids, more = random_ids(2, 8), random_ids(2, 8, seed=1)
    cache, starts = model(ids, use_cache=True).cache, torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 0] = True
    fresh = FastWeightsCache(model.config)
    fresh.block = cache.block
    found = model(more, cache=fresh, document_starts=starts).logits
    assert error(found[0], model(more[:1]).logits[0]) <= tolerances.FLOAT32
    assert error(found[1], model(more[1:]).logits[0]) > 1e-3  # and the other row has learned


@torch.no_grad()
def test_several_rows_with_borders_at_different_places():
    model = convert(make_gpt2(), KINDS["hybrid"]).eval()
    ids = random_ids(2, 20)
    positions = torch.stack(
        (torch.cat((torch.arange(6), torch.arange(14))), torch.cat((torch.arange(13), torch.arange(7))))
    )
    found = model(ids, position_ids=positions).logits
    for row, cut in ((0, 6), (1, 13)):
        for here in (slice(0, cut), slice(cut, 20)):
            assert error(found[row, here], model(ids[row : row + 1, here]).logits[0]) <= tolerances.FLOAT32


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_no_tokens_are_one_line(base, shape):
    model = convert(base, ConversionConfig(window=4))
    with pytest.raises(FastWeightsError, match=f"{shape[0]} rows of {shape[1]} tokens"):
        model(input_ids=torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_a_document_that_begins_after_a_cache_leaves_the_positions_before_it_as_they_are():
    reading = read_tokens((1, 4), filled(10), document_starts=torch.tensor([[False, False, True, False]]))
    assert reading.position_ids.tolist() == [[10, 11, 0, 1]]


def filled(tokens: int) -> FastWeightsCache:
    model = convert(make_llama(), ConversionConfig()).eval()
    cache = FastWeightsCache(model.config)
    model(random_ids(1, tokens), cache=cache, use_cache=True)
    return cache
