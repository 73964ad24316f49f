"""What every model with fast weights must pass, whatever its fast weights are."""

from __future__ import annotations

import torch

from fastweights.models import load_model
from tests import tolerances
from tests.conftest import random_ids
from tests.ops.problems import error


@torch.no_grad()
def check_pieces_equal_one_pass(model, cuts) -> None:
    """40 tokens read in pieces that end at `cuts`, with the state carried between them."""
    ids = random_ids(2, 40)
    whole = model(ids).logits
    cache, pieces = None, []
    for start, stop in zip((0, *cuts), (*cuts, 40), strict=True):
        output = model(ids[:, start:stop], cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    assert error(torch.cat(pieces, 1), whole) <= tolerances.FLOAT32
    assert cache.get_seq_length() == 40


@torch.no_grad()
def check_changed_and_saved_it_is_loaded_as_it_is(model, folder) -> None:
    """With all of its new parameters other than at the start."""
    ids = random_ids(2, 40)
    for name in model.new_parameter_names():
        model.get_parameter(name).add_(0.1)
    model.save_pretrained(folder)
    assert load_model(folder)(ids).logits.equal(model(ids).logits)


@torch.no_grad()
def check_a_padded_batch_generates_what_each_row_does_alone(model) -> None:
    """Two prompts of different lengths, the shorter one padded on the left."""
    rows = [random_ids(1, 12), random_ids(1, 20, seed=1)]
    batch = torch.cat([torch.cat([torch.full((1, 8), 256), rows[0]], 1), rows[1]])
    mask = torch.ones_like(batch)
    mask[0, :8] = 0
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    together = model.generate(batch, attention_mask=mask, **arguments)
    for row, ids in enumerate(rows):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert together[row, 20:].tolist() == alone[0, ids.shape[1] :].tolist()


PADDING = {"left": slice(0, 9), "right": slice(30, 39), "holes": slice(5, 39, 4)}


@torch.no_grad()
def check_padding_gives_each_row_what_it_has_alone(model, where: str):
    """A row of 30 tokens beside one of 39, read together, and then on: twice, the second time with padding again."""
    real = torch.ones(2, 39, dtype=torch.bool)
    real[0, PADDING[where]] = False
    parts = [real, torch.ones(2, 8, dtype=torch.bool), torch.tensor([[True, False, True], [True, True, False]])]
    ids, mask, cache, got = random_ids(2, 50), torch.empty(2, 0, dtype=torch.long), None, []
    for part in parts:
        new = ids[:, mask.shape[1] :][:, : part.shape[1]].masked_fill(~part, 256)
        mask = torch.cat((mask, part.long()), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = model(new, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        cache = output.cache
        got.append(output.logits)
    for row, together in enumerate(torch.cat(got, 1)):
        kept = mask[row].bool()
        assert error(together[kept], model(ids[row : row + 1, kept]).logits[0]) <= tolerances.FLOAT32
