"""Where a Hugging Face family keeps its queries, keys, values and output: one row of `ARCHITECTURES` each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from fastweights.layers.attention import FastWeightAttention, Projections


@dataclass(frozen=True)
class FusedProjections:
    """One matrix makes q, k and v, one after the other; no rotary embedding (GPT-2)."""

    qkv: str
    out: str
    dropout: str

    def project(self, attention: FastWeightAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = attention.get_submodule(self.qkv)(x).unflatten(-1, (3, attention.heads, attention.head_dim))
        return qkv.unbind(2)

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        return q, k

    def output(self, attention: FastWeightAttention, y: Tensor) -> Tensor:
        return attention.get_submodule(self.dropout)(attention.get_submodule(self.out)(y))


@dataclass(frozen=True)
class SplitProjections:
    """A matrix each for q, k and v, with fewer heads of k and v than of q or as many, and a rotary embedding."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "o_proj"

    def project(self, attention: FastWeightAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            attention.get_submodule(name)(x).unflatten(-1, (-1, attention.head_dim))
            for name in (self.q, self.k, self.v)
        )
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)

    def output(self, attention: FastWeightAttention, y: Tensor) -> Tensor:
        return attention.get_submodule(self.out)(y)


@dataclass(frozen=True)
class Architecture:
    """Names of the modules of one family, as seen from its `ForCausalLM` class."""

    layers: str
    attention: str
    norm: str
    """The normalisation before the attention."""
    projections: Projections
    positions: str | None = None
    """Learned embedding of absolute positions, which ends at the trained length; None where there is none."""


ARCHITECTURES = {
    "gpt2": Architecture(
        layers="transformer.h",
        attention="attn",
        norm="ln_1",
        projections=FusedProjections(qkv="c_attn", out="c_proj", dropout="resid_dropout"),
        positions="transformer.wpe",
    ),
    "llama": Architecture(
        layers="model.layers", attention="self_attn", norm="input_layernorm", projections=SplitProjections()
    ),
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row of a base model's config; an unknown family is an error that names the known ones."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise FastWeightsError(f"models of type {config.model_type!r} cannot be converted; known types are {known}")
    return ARCHITECTURES[config.model_type]


def position_limit(config: PreTrainedConfig) -> int | None:
    """Where a base model's absolute positions end; None for one whose positions are relative, or of another family."""
    architecture = ARCHITECTURES.get(config.model_type)
    return None if architecture is None or architecture.positions is None else config.max_position_embeddings


def attention_modules(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The attention of each layer of a `ForCausalLM` model, in order."""
    return [layer.get_submodule(architecture.attention) for layer in model.get_submodule(architecture.layers)]  # type: ignore[union-attr]
