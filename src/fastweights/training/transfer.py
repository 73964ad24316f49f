"""Transfer: each layer learns to reproduce the teacher's attention from the teacher's own input, all layers at once.

The loss is layer by layer, so it needs no pass through the student's other parts, and errors do not add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastweights.training.blocks import positions_if_packed
from fastweights.training.teacher import record_attention
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.layers.attention import FastWeightAttention
    from fastweights.models.modeling import AttentionRecord, FastWeightsForCausalLM
    from fastweights.settings.training import TransferConfig

_CALIBRATION_BLOCKS = 4
# Tokens of these that fix a layer's factors, of which there are one or two a head.
_CALIBRATION_TOKENS = 1024


class TransferTrainer(StageTrainer):
    """Trains the converted layers alone; everything else in the model stays as it is."""

    config: TransferConfig

    def __init__(self, student: FastWeightsForCausalLM, teacher: PreTrainedModel, *args, **kwargs) -> None:
        self.teacher = teacher
        self.positions: Any = student.config.settings.positions
        student.requires_grad_(False)
        for layer in student.fast_attentions():
            layer.requires_grad_(True)
        super().__init__(student, *args, **kwargs, new_parameters=student.new_parameter_names())
        self.teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        position_ids = positions_if_packed(inputs["position_ids"])
        records = record_attention(self.teacher, inputs["input_ids"], position_ids, positions=self.positions)
        # One unit for the whole run: that of each batch alone would weigh batches of dull text far too much.
        records = [record._replace(variance=unit) for record, unit in zip(records, self.variances, strict=True)]
        outputs = model(attention_records=records, position_ids=position_ids)
        # A mean over this batch: the Trainer divides by accumulation steps itself only if told that nobody did.
        self.loss_is_scaled_for_ga = False
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def run(self, *, resume: bool) -> None:
        blocks = [self.train_dataset[i]["input_ids"] for i in range(min(_CALIBRATION_BLOCKS, len(self.train_dataset)))]  # type: ignore[arg-type,index]
        first = torch.stack(blocks).to(self.args.device)
        # Calibration takes these for running text, both for the teacher and for the student.
        records = record_attention(self.teacher, first, positions=self.positions)
        self.variances = [record.variance for record in records]
        if self.config.calibrate:
            calibrate(self.model, records)  # type: ignore[arg-type]
        super().run(resume=resume)
        self.model.requires_grad_(True)  # type: ignore[union-attr]


@torch.no_grad()
def calibrate(student: FastWeightsForCausalLM, records: list[AttentionRecord]) -> None:
    """Give each head the factors that bring its layer nearest to the teacher's output, in the least-squares sense.

    Un-normalised fast weights are sums over all that was read: without this their output is orders of magnitude off.

    Args:
        records: what the teacher's attention did with some text, one for each layer of the model.
    """
    for layer in student.fast_attentions():
        record = records[layer.layer_idx]
        if layer.window_bias is not None:
            layer.window_bias.copy_(_lost_logits(layer, record))
        parts = _contributions(layer, record, student.model.sink_embeddings(record.inputs))
        factors = _least_squares(parts, _targets(layer, record))
        layer.fast_scale.copy_(factors[: layer.heads])
        if layer.window_scale is not None:
            layer.window_scale.copy_(factors[layer.heads :])


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
    layer: FastWeightAttention, record: AttentionRecord, sink_embeddings: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "factors N d"]:
    """What each head's fast weights, then each head's window, add to the residual stream at a factor of 1."""
    fast, window = layer.read(
        record.inputs, position_embeddings=record.position_embeddings, sink_embeddings=sink_embeddings
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
    return x[:: max(1, len(x) // _CALIBRATION_TOKENS)]


def _least_squares(parts: Float[Tensor, "n N d"], target: Float[Tensor, "N d"]) -> Float[Tensor, " n"]:
    a = parts.flatten(1).double()
    gram = a @ a.T
    # A little ridge, as heads may say nearly the same.
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, a @ target.flatten().double()).float()
