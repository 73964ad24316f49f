"""What every model with fast weights must pass, whatever its fast weights are."""

from __future__ import annotations

import torch

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
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert error(torch.cat(pieces, 1), whole) <= tolerances.FLOAT32
    assert cache.get_seq_length() == 40


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


@torch.no_grad()
def check_padding_gives_each_row_what_it_has_alone(model, side: str):
    """A row of 30 tokens beside one of 39; returns the cache, the mask and the shorter row's tokens."""
    ids, other = random_ids(1, 30), random_ids(1, 39, seed=1)
    pad = torch.full((1, 9), 256)
    padded = torch.cat([torch.cat([pad, ids] if side == "left" else [ids, pad], 1), other])
    mask = torch.ones(2, 39, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(30, 39)] = 0
    output = model(padded, attention_mask=mask, use_cache=True)
    row = output.logits[0, 9:] if side == "left" else output.logits[0, :30]
    assert error(row, model(ids).logits[0]) <= tolerances.FLOAT32
    assert error(output.logits[1], model(other).logits[0]) <= tolerances.FLOAT32
    return output.past_key_values, mask, ids
