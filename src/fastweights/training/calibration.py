"""Calibration: where the new factors of a fresh conversion start, before anything is trained.

Un-normalised fast weights are sums over all that was read, so that their output is orders of magnitude off: each head
is given the unit that makes it as large as its share of the teacher's output. Least squares then give the factors that
bring each layer nearest to the teacher's attention; but errors add up from layer to layer, and what is best for each
may be worse than nothing for the model. So the model's own loss says how much of the way there is worth going from
where the window stands alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastweights.training.blocks import positions_if_packed
from fastweights.training.next_token import next_token_loss
from fastweights.training.teacher import record_attention

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.layers.attention import FastWeightAttention
    from fastweights.layers.window import WindowEmbeddings
    from fastweights.models.modeling import AttentionRecord, FastWeightsForCausalLM
    from fastweights.training.blocks import TokenBlocks

SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""How much of the way from the window alone to least squares is tried."""
# At a share of 0 gates and projections of the fast weights get no gradient until the factors have moved: another share
# is taken if the loss is no higher by more than this part of it.
_WORTH_A_GRADIENT = 1e-3
# Every other one is fitted to, and the rest are for the loss: on the same text least squares look better than they are.
_BLOCKS = 8
# Of each block: what comes later in longer ones would not be worth the time.
_LENGTH = 1024
# Tokens that fix a layer's factors, of which there are one or two a head.
_TOKENS = 1024


def is_fresh(student: FastWeightsForCausalLM) -> bool:
    """Whether no factor has moved since the conversion, which may have left fast weights out beside a window."""
    return all(_as_converted(layer) for layer in student.fast_attentions())


def _as_converted(layer: FastWeightAttention) -> bool:
    if not all(bool((x == 1).all()) for x in (layer.fast_unit, *layer.factors()[1:])):
        return False
    return bool((layer.fast_scale == 1).all()) or bool(layer.window and not layer.fast_scale.any())


@torch.no_grad()
def calibrate(student: FastWeightsForCausalLM, teacher: PreTrainedModel, blocks: TokenBlocks) -> float:
    """Give a fresh conversion the factors to start from, at which its loss is lowest.

    The window alone is among what is tried, so that no conversion starts worse than it, but for a tenth of a percent.

    Args:
        student: the conversion; it is changed in place.
        teacher: the model that it was made from, on the same device.
        blocks: training text, of which a few are read.

    Returns:
        The share of least squares in the factors, one of `SHARES`.
    """
    spread = [blocks[i * len(blocks) // _BLOCKS] for i in range(_BLOCKS)]
    spread = [{name: values[:_LENGTH] for name, values in block.items()} for block in spread]
    ids = torch.stack([block["input_ids"] for block in spread[::2]]).to(student.device)
    # These are taken for running text, both for the teacher and for the student.
    fit_layers(student, record_attention(teacher, ids, positions=student.config.settings.positions))  # type: ignore[arg-type]
    fitted = [[factor.clone() for factor in layer.factors()] for layer in student.fast_attentions()]
    losses = {}
    for share in SHARES:
        _go(student, fitted, share)
        losses[share] = _loss(student, spread[1::2])
    best = min(losses, key=lambda share: losses[share])
    if best == 0:
        best = max(share for share, loss in losses.items() if loss <= losses[0] * (1 + _WORTH_A_GRADIENT))
    _go(student, fitted, best)
    return best


@torch.no_grad()
def fit_layers(student: FastWeightsForCausalLM, records: list[AttentionRecord]) -> None:
    """Give each head its unit, and the factors that bring its layer nearest to the teacher's output by least squares.

    Args:
        student: whose units and factors are set.
        records: what the teacher's attention did with some text, one for each layer of the model.
    """
    for layer in student.fast_attentions():
        record = records[layer.layer_idx]
        if layer.window_bias is not None:
            layer.window_bias.copy_(_lost_logits(layer, record))
        parts = _contributions(layer, record, student.model.window_embeddings(record.inputs))
        targets = _targets(layer, record)
        sizes = parts[: layer.heads].flatten(1).norm(dim=1)
        unit = targets.norm() / layer.heads**0.5 / sizes
        layer.fast_unit.copy_(torch.where(unit.isfinite() & (unit > 0), unit, 1.0))
        parts[: layer.heads] *= layer.fast_unit[:, None, None]
        factors = _least_squares(parts, targets)
        layer.fast_scale.copy_(factors[: layer.heads])
        if layer.window_scale is not None:
            layer.window_scale.copy_(factors[layer.heads :])


def _go(student: FastWeightsForCausalLM, fitted: list[list[Tensor]], share: float) -> None:
    """From the window alone (factors 0 and 1) a share of the way to `fitted`."""
    for layer, ends in zip(student.fast_attentions(), fitted, strict=True):
        for factor, start, end in zip(layer.factors(), (0.0, 1.0), ends, strict=False):
            factor.copy_(start + share * (end - start))


def _loss(student: FastWeightsForCausalLM, blocks: list[dict[str, Tensor]]) -> float:
    """Of the next token, in nats; infinite where it is not finite."""
    was_training = student.training
    student.eval()
    losses = []
    for block in blocks:
        ids, labels, places = (block[name][None].to(student.device) for name in ("input_ids", "labels", "position_ids"))
        logits = student(input_ids=ids, position_ids=positions_if_packed(places), use_cache=False).logits
        losses.append(next_token_loss(logits, labels))
    student.train(was_training)
    return torch.stack(losses).mean().nan_to_num(nan=float("inf")).item()


def _lost_logits(layer: FastWeightAttention, record: AttentionRecord) -> Float[Tensor, "H bias"]:
    """What absolute positions added to q·k on average, per head and place, and the student's q·k now lack."""
    with_positions, without = (layer.project(x)[:2] for x in (record.teacher_inputs, record.inputs))
    length, group = record.inputs.shape[1], layer.heads // layer.kv_heads
    lost = torch.zeros(layer.heads, layer.window + layer.sinks, device=record.inputs.device)
    for distance in range(min(layer.window, length)):
        for sign, (q, k) in ((1, with_positions), (-1, without)):
            keys = k[:, : length - distance].repeat_interleave(group, dim=2)
            lost[:, distance] += sign * layer.scaling * (q[:, distance:] * keys).sum(-1).mean((0, 1))
    for sink in range(min(layer.sinks, length - layer.window)):
        for sign, (q, k) in ((1, with_positions), (-1, without)):
            key = k[:, sink : sink + 1].repeat_interleave(group, dim=2)
            far = (q[:, sink + layer.window :] * key).sum(-1).mean((0, 1))
            lost[:, layer.window + sink] += sign * layer.scaling * far
    return lost


def _contributions(
    layer: FastWeightAttention, record: AttentionRecord, window_embeddings: dict[int, WindowEmbeddings] | None
) -> Float[Tensor, "factors N d"]:
    """What each head's fast weights, then each head's window, add to the residual stream at a factor of 1."""
    fast, window = layer.read(
        record.inputs, position_embeddings=record.position_embeddings, window_embeddings=window_embeddings
    )
    parts = []
    for y in (fast,) if window is None else (fast, window):
        for head in range(layer.heads):
            alone = torch.zeros_like(y)
            alone[:, :, head] = y[:, :, head]
            parts.append(_sample(layer.output(alone.flatten(-2)) - _bias(layer, record)))
    return torch.stack(parts)


def _targets(layer: FastWeightAttention, record: AttentionRecord) -> Float[Tensor, "N d"]:
    return _sample(record.output - _bias(layer, record))


def _bias(layer: FastWeightAttention, record: AttentionRecord) -> Float[Tensor, " d"]:
    nothing = record.inputs.new_zeros(1, 1, layer.heads * layer.head_dim)
    return layer.output(nothing)[0, 0]


def _sample(x: Float[Tensor, "B T d"]) -> Float[Tensor, "N d"]:
    x = x.flatten(0, 1)
    return x[:: max(1, len(x) // _TOKENS)]


def _least_squares(parts: Float[Tensor, "n N d"], target: Float[Tensor, "N d"]) -> Float[Tensor, " n"]:
    a = parts.flatten(1).double()
    gram = a @ a.T
    # A little ridge, as heads may say nearly the same, or all of a layer's nothing.
    ridge = 1e-4 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, a @ target.flatten().double()).float()
