"""Where a Hugging Face family keeps its queries, keys, values and output: one row of `ARCHITECTURES` each.

What a row cannot express is refused when a model is converted: parts of the attention that its projections do not know
of (`layers/attention.py`, `check_known`), and whatever else makes an exact softmax over its queries, keys and values
differ from the model's own attention (`conversion.py`, `check_row`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedConfig

    from fastweights.layers.attention import Projections


# Of transformers' modules of models, those that ours need are imported by whoever uses them: ours are imported while
# transformers' are, as part of which they register themselves.


def _rotated(q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb  # Llama's, for float32 cosines, too

    return apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)


def _partly_rotated(q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)


class NamedModules:
    """Projections whose fields are names of the attention's modules; None for one that the family lacks."""

    def modules(self) -> set[str]:
        """Names of all modules of the attention that this knows of."""
        return {name for field in fields(self) if (name := getattr(self, field.name)) is not None}  # type: ignore[arg-type]


@dataclass(frozen=True)
class FusedProjections(NamedModules):
    """One matrix makes all queries, then all keys, then all values; no rotary embedding (GPT-2)."""

    qkv: str
    out: str
    out_dropout: str
    attention_dropout: str
    """Of the softmax, which is gone."""

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B, T, H, D)."""
        return attention.get_submodule(self.qkv)(x).unflatten(-1, (3, -1, head_dim)).unbind(2)

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        """As they are."""
        return q, k

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """Back to the residual stream."""
        return attention.get_submodule(self.out_dropout)(attention.get_submodule(self.out)(y))


@dataclass(frozen=True)
class InterleavedProjections(NamedModules):
    """One matrix makes q, k and v of one head after the other; a rotary embedding of part of a head (GPT-NeoX)."""

    qkv: str
    out: str

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B, T, H, D)."""
        return attention.get_submodule(self.qkv)(x).unflatten(-1, (-1, 3 * head_dim)).chunk(3, -1)

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        """With rotary embedding in the first channels of each head."""
        return _partly_rotated(q, k, position_embeddings)

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """Back to the residual stream."""
        return attention.get_submodule(self.out)(y)


@dataclass(frozen=True)
class GroupedProjections(NamedModules):
    """One matrix makes all queries, then all keys, then all values, of which there may be fewer (Phi-3)."""

    qkv: str
    out: str

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D)."""
        qkv = attention.get_submodule(self.qkv)(x)
        width: int = attention.get_submodule(self.out).in_features  # type: ignore[assignment]
        parts = (qkv[..., :width], *qkv[..., width:].chunk(2, -1))
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        """With rotary embedding in the first channels of each head, or in all."""
        return _partly_rotated(q, k, position_embeddings)

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """Back to the residual stream."""
        return attention.get_submodule(self.out)(y)


@dataclass(frozen=True)
class SplitProjections(NamedModules):
    """A matrix each for q, k and v, with fewer heads of k and v than of q or as many, and a rotary embedding."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "o_proj"
    q_norm: str | None = None
    """Normalisation of each head's query, before the rotary embedding."""
    k_norm: str | None = None

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D)."""
        q, k, v = (attention.get_submodule(name)(x).unflatten(-1, (-1, head_dim)) for name in (self.q, self.k, self.v))
        return *self._normalised(attention, q, k), v

    def _normalised(self, attention: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None:
            q = attention.get_submodule(self.q_norm)(q)
        if self.k_norm is not None:
            k = attention.get_submodule(self.k_norm)(k)
        return q, k

    def rotate(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        """With rotary embedding."""
        return _rotated(q, k, position_embeddings)

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """Back to the residual stream."""
        return attention.get_submodule(self.out)(y)


@dataclass(frozen=True)
class JointlyNormalisedProjections(SplitProjections):
    """As `SplitProjections`, but the norms are over all heads of a token at once (OLMo 2)."""

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k and v (B, T, G, D)."""
        q, k, v = (attention.get_submodule(name)(x) for name in (self.q, self.k, self.v))
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (*self._normalised(attention, q, k), v))
        return q, k, v


@dataclass(frozen=True)
class Architecture:
    """Names of the modules of one family, as seen from its headless model."""

    layers: str
    attention: str
    projections: Projections
    norm: str | None = None
    """The normalisation before the attention, without which absolute positions cannot be dropped."""
    positions: str | None = None
    """Learned embedding of absolute positions, which ends at the trained length; None where there is none."""
    position_offset: int = 0
    """Row of the first position in that embedding."""
    rotary: str | None = "rotary_emb"
    """Maker of cosines and sines of a rotary embedding from positions; None where there is none."""
    rotary_arguments: tuple[str, ...] = ()
    """What it is to be told besides."""
    cache_argument: str = "cache"
    """Name under which a layer hands its attention the cache."""


def _like_llama(projections: Projections, **fields) -> Architecture:
    return Architecture(layers="layers", attention="self_attn", projections=projections, **fields)


_NORMALISED = SplitProjections(q_norm="q_norm", k_norm="k_norm")

ARCHITECTURES = {
    "gemma3_text": _like_llama(_NORMALISED, rotary_arguments=("full_attention",)),
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        projections=FusedProjections("c_attn", "c_proj", "resid_dropout", "attn_dropout"),
        norm="ln_1",
        positions="wpe",
        rotary=None,
    ),
    "gpt_neox": Architecture(
        layers="layers",
        attention="attention",
        projections=InterleavedProjections("query_key_value", "dense"),
        cache_argument="layer_past",
    ),
    "llama": _like_llama(SplitProjections()),
    "mistral": _like_llama(SplitProjections()),
    "olmo2": _like_llama(JointlyNormalisedProjections(q_norm="q_norm", k_norm="k_norm")),
    "opt": Architecture(
        layers="decoder.layers",
        attention="self_attn",
        projections=SplitProjections(out="out_proj"),
        norm="self_attn_layer_norm",
        positions="decoder.embed_positions",
        position_offset=2,
        rotary=None,
    ),
    "phi3": _like_llama(GroupedProjections("qkv_proj", "o_proj")),
    "qwen2": _like_llama(SplitProjections()),
    "qwen3": _like_llama(_NORMALISED),
    "smollm3": _like_llama(SplitProjections()),
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


def position_vectors(headless: nn.Module, row: Architecture) -> Float[Tensor, "positions d"]:
    """The learned embedding of each absolute position of a headless model whose family has these.

    Where they were dropped, the one that stands for all.
    """
    vectors = headless.get_parameter(f"{row.positions}.weight")
    kept = isinstance(headless.get_submodule(str(row.positions)), nn.Embedding)
    return vectors[row.position_offset :] if kept else vectors


def local_windows(config: PreTrainedConfig) -> list[int | None]:
    """Tokens that the base model's own softmax sees in each layer; None in one that sees all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [None if kind == "full_attention" else window for kind in kinds]


def local_layers(config: PreTrainedConfig) -> set[int]:
    """Layers with such a window, beside others that see all: by default these stay as they are."""
    local = {i for i, window in enumerate(local_windows(config)) if window is not None}
    return local if len(local) < config.num_hidden_layers else set()


def has_rotary(attention: nn.Module) -> bool:
    """Whether an attention uses the rotary embedding that all layers are given; some of SmolLM3's do not."""
    return bool(getattr(attention, "use_rope", True))


def attention_modules(headless: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The attention of each layer of a headless model, in order."""
    layers = headless.get_submodule(architecture.layers)
    return [layer.get_submodule(architecture.attention) for layer in layers]  # type: ignore[union-attr]
