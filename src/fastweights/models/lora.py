"""LoRA on the projections of converted attention, by peft: little to train, and less to keep.

E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastweights.errors import FastWeightsError
from fastweights.layers.attention import FastWeightAttention
from fastweights.models.quantisation import check_not_quantised

if TYPE_CHECKING:
    from types import ModuleType

    from peft import LoraConfig
    from torch import Tensor

    from fastweights.models.modeling import FastWeightsForCausalLM

ADAPTER = "default"
"""peft's name for the one adapter that a model has."""
_LINEAR = (nn.Linear, Conv1D)


def lora_config(
    model: FastWeightsForCausalLM, rank: int, *, alpha: float | None = None, targets: list[str] | None = None
) -> LoraConfig:
    """LoRA on each linear layer that converted attention has from the base model, at a scale of 2.

    Args:
        model: a conversion.
        rank: of each layer's change.
        alpha: the rank times another scale.
        targets: full names of other layers.

    Raises:
        FastWeightsError: if peft is not installed.
    """
    peft = _peft()
    if targets is None:
        targets = [
            f"{name}.{child}"
            for name, attention in model.named_modules()
            if isinstance(attention, FastWeightAttention)
            for child, module in attention.named_children()
            if isinstance(module, _LINEAR)
        ]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )


def add_lora(
    model: FastWeightsForCausalLM, rank: int, *, alpha: float | None = None, targets: list[str] | None = None
) -> None:
    """Leave nothing to train but LoRA of this rank and what the conversion added; LoRA that is there already stays.

    Args:
        model: a conversion; it is changed in place, and computes what it did.
        rank: of each projection's change.
        alpha: as for `lora_config`.
        targets: as for `lora_config`.

    Raises:
        FastWeightsError: if peft is not installed, or LoRA of another rank is there.
    """
    check_lora(model, rank)
    if not lora_rank(model):
        config = lora_config(model, rank, alpha=alpha, targets=targets)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, model, ADAPTER)
    new = set(model.new_parameter_names())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new or "lora_" in name)


def check_lora(model: FastWeightsForCausalLM, rank: int) -> None:
    """Refuse what `add_lora` could not do."""
    check_not_quantised(model, "LoRA")
    if (there := lora_rank(model)) not in (0, rank):
        raise FastWeightsError(f"lora_rank is {rank}, and the adapter to train on has {there}: give that")
    _peft()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise FastWeightsError("LoRA needs peft, which is not installed: pip install 'fastweights[lora]'") from error
    return peft


def tensors_beside(model: FastWeightsForCausalLM) -> dict[str, Tensor]:
    """By name, what conversion and LoRA have added to the weights of the base model."""
    new = set(model.new_tensors())
    return {name: tensor for name, tensor in model.state_dict().items() if name in new or ".lora_" in name}


def lora_rank(model: nn.Module) -> int:
    """Of LoRA beside the projections; 0 if there is none."""
    return next((len(parameter) for name, parameter in model.named_parameters() if "lora_A" in name), 0)
