"""A step of decoding in few and large operations: what one token costs on a CPU is otherwise mostly Python.

A converted model of Llama's kind (RMS norms, a gated unit; Gemma 3 and OLMo 2 have them in other places), GPT-2,
GPT-NeoX or OPT gets its own step for one token of each row, of the same weights and the same cache: products by the
library that its layers have, and what lies between two of them by one CPU kernel (`ops/decoding`), for which a layer
that keeps its softmax attention is a window without fast weights, which grows or is the layer's own.
`FastWeightsForCausalLM` takes it by itself where `why_plain` has nothing against it, and goes on plainly with
everything else: other families, padding, gradients, hooks.

Notation: B rows, d width of the model, H query heads, G key/value heads, D width of a head, K key width, V value width,
W window, S sinks, C channels of a short convolution and N tokens before its own.
"""

from __future__ import annotations

import threading
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.convolution import ShortConvolution
from fastweights.layers.eight_bits import EightBits
from fastweights.layers.feature_maps import FeatureMap, Projection, SoftmaxOfProjection
from fastweights.layers.linear import FORWARDS, linear
from fastweights.layers.mix_gate import MixGate
from fastweights.layers.precision import Float32Linear
from fastweights.layers.quantised import FEW, LINEAR, QuantisedLinear
from fastweights.layers.rules import (
    AddRule,
    AverageRule,
    DecayRule,
    DeltaAndAverageRule,
    DeltaRule,
    GatedDeltaRule,
    GatedRule,
    KeptRule,
    LowRank,
    Rule,
)
from fastweights.models.architectures import (
    FusedProjections,
    GroupedProjections,
    InterleavedProjections,
    JointlyNormalisedProjections,
    SplitProjections,
    attention_modules,
    has_rotary,
    local_windows,
    position_vectors,
)
from fastweights.models.cache import (
    Counting,
    FastWeightsCache,
    HybridCacheLayer,
    PureCacheLayer,
    SlidingCacheLayer,
)
from fastweights.models.replacement import inverse_rotation
from fastweights.models.rings import GrowingCacheLayer, GrowingWindow, KeepsKeysAndValues, Ring, Windowed
from fastweights.ops.numba.runtime import load_kernels, run_on_team, task_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from fastweights.models.modeling import FastWeightsForCausalLM


_GATED = {
    "silu": "gated_unit",
    "swish": "gated_unit",
    "gelu_new": "gated_gelu_unit",
    "gelu_pytorch_tanh": "gated_gelu_unit",
}
_UNGATED = {
    "gelu": "exact_gelu_unit",
    "gelu_new": "gelu_unit",
    "gelu_pytorch_tanh": "gelu_unit",
    "relu": "relu_unit",
}


class _Family(NamedTuple):
    """Where the models of a family have what a step needs."""

    embed: str = "embed_tokens"
    layers: str = "layers"
    last_norm: str = "norm"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Before its attention and before its unit; none in a family that has these after them alone."""
    norms_after: tuple[str, ...] = ()
    """Of what its attention and its unit say."""
    attention: str = "self_attn"
    unit: str = "mlp"
    """What its unit is in; nothing where its parts are the layer's own."""
    expand: tuple[str, ...] = ("gate_proj", "up_proj")
    """Of its unit."""
    contract: str = "down_proj"
    gated: bool = True
    """Whether one half of what is expanded is a gate of the other."""
    others: frozenset[str] = frozenset({"act_fn"})
    """Parts of a layer, or of its unit, that do nothing here or that a kernel does."""
    activation: str = "hidden_act"
    """Where its config says which activation it has."""
    parallel: str | None = None
    """Where its config says that a layer's unit reads what its attention reads, and both are added."""
    settings: tuple[tuple[str, object], ...] = ()
    """Of its config, that its models have but for a few."""

    @property
    def units(self) -> dict[str, str]:
        """The kernels of its activations, of those that there are kernels of."""
        return _GATED if self.gated else _UNGATED


_LLAMA = _Family()
_FAMILIES = {
    "gemma3_text": _Family(
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
        activation="hidden_activation",
    ),
    "gpt2": _Family(
        embed="wte",
        layers="h",
        last_norm="ln_f",
        norms=("ln_1", "ln_2"),
        attention="attn",
        expand=("c_fc",),
        contract="c_proj",
        gated=False,
        others=frozenset({"act", "dropout"}),
        activation="activation_function",
    ),
    "gpt_neox": _Family(
        embed="embed_in",
        last_norm="final_layer_norm",
        attention="attention",
        expand=("dense_h_to_4h",),
        contract="dense_4h_to_h",
        gated=False,
        others=frozenset({"act", "post_attention_dropout", "post_mlp_dropout"}),
        parallel="use_parallel_residual",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _Family(norms=(), norms_after=("post_attention_layernorm", "post_feedforward_layernorm")),
    "opt": _Family(
        embed="decoder.embed_tokens",
        layers="decoder.layers",
        last_norm="decoder.final_layer_norm",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        unit="",
        expand=("fc1",),
        contract="fc2",
        gated=False,
        others=frozenset({"activation_fn"}),
        activation="activation_function",
        settings=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
    "phi3": _Family(
        expand=("gate_up_proj",), others=frozenset({"activation_fn", "resid_attn_dropout", "resid_mlp_dropout"})
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}
_RULES = (AddRule, DecayRule, AverageRule, GatedRule, DeltaRule, GatedDeltaRule, DeltaAndAverageRule)
_MAPS = (FeatureMap, Projection)
_PROJECTIONS = (
    SplitProjections,
    JointlyNormalisedProjections,
    FusedProjections,
    GroupedProjections,
    InterleavedProjections,
)
_OURS = (HybridCacheLayer, PureCacheLayer)
"""Layers of a cache that are of layers with fast weights."""
_LINEAR = {nn.Linear, Conv1D, Float32Linear, *LINEAR.values()}
_DECODER = "_decoder"
"""Where a model keeps it."""
_ROOMS = 4
"""Numbers of rows for which room is kept, and places of texts for which angles are."""
_ANGLES = 32
"""Tokens whose rotary embeddings are computed at once, as one takes as long."""
_AT_ONCE = 4
"""Tokens that an assistant reads one by one: more are read faster by transformers' modules."""
_SOFTMAX = (None, "sdpa", "eager")
"""Implementations of attention that are softmax and nothing else."""
_DROPOUTS = "attention_dropout", "dropout", "layerdrop"
"""Numbers that modules have in the place of one that drops out."""
_WORTH_A_TEAM = 20_000
"""Numbers that a layer's kernel reads for a token; one thread has done with fewer before others have woken up."""
_enabled = True
_beginning = threading.Lock()
"""Held while layers of few bits are joined, and what serves all steps of a model is made."""


def set_fast_decoding(enabled: bool) -> None:
    """Switch these steps on or off everywhere in this process; off, each token goes through transformers' modules."""
    global _enabled
    _enabled = enabled


def decode(
    model: FastWeightsForCausalLM,
    input_ids: Int[Tensor, "B T"] | None,
    cache: Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    others: dict[str, Any],
) -> Float[Tensor, "B T vocabulary"] | None:
    """Logits after one more token of each row, which becomes part of the cache; None if this is no case for it.

    An assistant reads a few tokens like this before it writes: what is left of its draft, and the token after that.

    Args:
        model: the model.
        input_ids: (B, 1), or of an assistant a few more; or whatever its forward was given.
        cache: with the state of the tokens before.
        attention_mask: of which no token may be padding.
        position_ids: which must be those that follow.
        others: arguments of its forward that change what it does, all of which must be None or False.
    """
    if (
        input_ids is None
        or cache is None
        or input_ids.ndim != 2
        or not _enabled
        or torch.is_grad_enabled()
        or model.training
        or any(value is not None and value is not False for value in others.values())
        or not _is_plain_call()
        or not isinstance(cache, FastWeightsCache)
        or not 1 <= input_ids.shape[1] <= (_AT_ONCE if cache.keeps_states else 1)
        or not _goes_on(cache, input_ids.shape, attention_mask, position_ids)
    ):
        return None
    state = cache.decoding
    if (
        state is None
        or state.decoder.model is not model
        or not state.is_current(cache, len(input_ids))
        or not state.has_room(input_ids.shape[1])
    ):
        state = cache.decoding = None  # which may hold much: its successor is as large
        with _beginning, torch.inference_mode(False), torch.no_grad():  # what is made here is of use later, too
            state = cache.decoding = _begin(model, cache, len(input_ids))
    if state is None or (model.max_positions is not None and state.tokens + input_ids.shape[1] > model.max_positions):
        return None  # to be told that positions end there
    lock = state.decoder.lock
    if not lock.acquire(blocking=False):  # another thread decodes with the same model
        return None
    try:
        logits = [state.decoder.step(token, state, cache) for token in input_ids.split(1, dim=1)]
    finally:
        lock.release()
    if len(logits) == 1:
        return logits[0]
    cache.about_to_read()  # what comes now is a draft
    return torch.cat(logits, 1)


def _goes_on(cache: FastWeightsCache, shape: tuple[int, ...], mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether a mask hides nothing, and positions are the next ones, counted as a cache counts its tokens."""
    past, (rows, tokens) = cache.get_seq_length(), shape
    if mask is not None and not (tuple(mask.shape) in {(rows, tokens), (rows, past + tokens)} and bool(mask.all())):
        return False
    return position_ids is None or bool((position_ids - past == torch.arange(tokens, device=position_ids.device)).all())


def _is_plain_call() -> bool:
    """Whether nothing watches what torch does, as tracers, counters and autocast do."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch.is_autocast_enabled("cpu")
        or torch.overrides._len_torch_function_stack() > 0
        or torch.nn.modules.module._has_any_global_hook()
        or forward_ad._current_level >= 0
    )


_ACTIVATIONS = ("act", "act_fn", "activation_fn")
"""What families call the activation of their layers or units."""


def why_plain(model: FastWeightsForCausalLM) -> str | None:
    """Why a model's steps go through transformers' modules; None where they do not."""
    base, config = model.model.base, model.config.base
    family = _FAMILIES.get(config.model_type)
    if family is None:
        return f"it is of the family {config.model_type}; those that have such steps are {', '.join(_FAMILIES)}"
    for name, usual in family.settings:
        if getattr(config, name) != usual:
            return f"its {name} is {getattr(config, name)}"
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        return "its embedding is of another width than its layers"
    layers: Any = base.get_submodule(family.layers)
    if (reason := _why_not_softmax(model)) is not None:
        return reason
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in model.parameters()):
        return "it is not in float32 on a CPU"
    activation = getattr(config, family.activation)
    if activation not in family.units:
        return f"its activation is {activation}"
    parts = {family.attention, *family.norms, *family.norms_after}
    unit = {*family.expand, family.contract}
    parts |= {family.unit} if family.unit else unit
    for layer in layers:
        found = [(layer, parts), (layer.get_submodule(family.unit), unit)] if family.unit else [(layer, parts)]
        if any({name for name, _ in module.named_children()} - family.others != needs for module, needs in found):
            return "its layers have other parts than its family's"
        for module, _ in found:
            if type(module).__module__ != type(base).__module__:
                return f"it has a {type(module).__name__}, which is not its family's"
            for name in _ACTIVATIONS:
                if type(act := getattr(module, name, None)) not in (type(None), type(ACT2FN[activation])):
                    return f"its activation is {type(act).__name__}"
    for attention in model.fast_attentions():
        rule = attention.rule
        if type(rule) not in _RULES or rule.shape.normaliser or not _has_usual_parts(rule):
            return f"its rule is {type(rule).__name__}, or has a normaliser or parts of its own"
        if type(attention.query_map) not in _MAPS or type(attention.key_map) not in _MAPS:
            return f"its feature map is {type(attention.query_map).__name__}"
        if type(attention.value_map) not in (type(None), Projection):
            return f"its value map is {type(attention.value_map).__name__}"
        if type(attention.mix_gate) not in (type(None), MixGate):
            return f"its gate on the mix is {type(attention.mix_gate).__name__}"
        convolution = attention.convolution
        if type(convolution) not in (type(None), ShortConvolution):
            return f"its convolution is {type(convolution).__name__}"
        if convolution is not None and not convolution.weight.is_contiguous():
            return "the taps of its convolution lie apart in memory"
    attentions = _all_attentions(model)
    for attention in attentions:
        if type(attention.projections) not in _PROJECTIONS:
            return "its projections are other than its family's"
        if (module := next((x for x in _multiplied(attention) if type(x) not in _LINEAR), None)) is not None:
            return f"it has layers of the kind {type(module).__name__}"
    norms = [layer.get_submodule(name) for layer in layers for name in (*family.norms, *family.norms_after)]
    norms += [norm for attention in attentions for norm in _head_norms(attention)]
    for norm in (*norms, base.get_submodule(family.last_norm)):
        is_centred = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
        if not is_centred and _rms_numbers(norm) is None:
            return f"it has norms of the kind {type(norm).__name__}"
    units = [layer.get_submodule(family.unit) for layer in layers]
    if any(type(each.get_submodule(name)) not in _LINEAR for each in units for name in unit):
        return "it has other layers in its units"
    for module in model.modules():
        forward = vars(module).get("forward")
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks"
        if _drops_out(module):
            return "it drops out"
        if forward is not None and getattr(forward, "__func__", None) not in FORWARDS:
            return f"a {type(module).__name__} has a forward of its own"
    return None


def _why_not_softmax(model: FastWeightsForCausalLM) -> str | None:
    """What a layer that keeps its softmax attention has beyond what its family's own has."""
    base, config = model.model.base, model.config.base
    for i, attention in enumerate(attention_modules(base, model.model.architecture)):
        if isinstance(attention, FastWeightAttention):
            continue
        if type(attention).__module__ != type(base).__module__:
            return f"layer {i} has an attention of the kind {type(attention).__name__}"
        if not attention.is_causal:
            return f"layer {i} sees tokens to come"
        if config._attn_implementation not in _SOFTMAX:
            return f"its softmax attention is {config._attn_implementation}"
    return None


def _all_attentions(model: FastWeightsForCausalLM) -> list[FastWeightAttention | _Softmax]:
    """Of each layer, in order."""
    modules = attention_modules(model.model.base, model.model.architecture)
    return [each if isinstance(each, FastWeightAttention) else _Softmax(each, model) for each in modules]


class _Softmax:
    """An attention that was not converted, as a step sees those that were: a window without fast weights.

    The window is of all tokens, or the layer's own.

    Args:
        attention: of the base model.
        model: that it is in.
    """

    rule = query_map = key_map = value_map = convolution = mix_gate = window_bias = None
    window, rotary, writes_leaving, takes_rotary_off = 0, True, True, False

    def __init__(self, attention: nn.Module, model: FastWeightsForCausalLM) -> None:
        config = model.config
        self.get_submodule = attention.get_submodule
        self.projections = model.model.architecture.projections
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scaling: float = attention.scaling  # type: ignore[assignment]
        self.rotates = has_rotary(attention)
        self.fast_scale = self.fast_unit = _zeros(self.heads)
        self.window_scale = _zeros(self.heads) + 1


def _drops_out(module: nn.Module) -> bool:
    """As one may that was switched on by itself, in a model that is not trained."""
    return module.training and _dropout(module) > 0


def _dropout(module: nn.Module) -> float:
    """How much a module would drop out; softmax attentions and OPT's layers have a number for it, and no module."""
    if isinstance(module, nn.Dropout):
        return module.p
    shares = [getattr(module, name, 0.0) for name in _DROPOUTS]
    return max(share if isinstance(share, int | float) else 0.0 for share in shares)


def _multiplied(attention: FastWeightAttention | _Softmax) -> list[nn.Module]:
    """All that multiplies by a matrix, or is to be such a layer."""
    names: Any = attention.projections
    parts = [
        part
        for gate in _gates(attention.rule)
        for part in ((gate.down, gate.up) if isinstance(gate, LowRank) else (gate,))
    ]
    parts += [] if attention.mix_gate is None else [attention.mix_gate.gate]
    return [attention.get_submodule(name) for name in (*_inner(names), names.out)] + [
        part for part in parts if part is not None
    ]


def _has_usual_parts(rule: Rule) -> bool:
    """Whether a rule made of others has them as it was made, of which a kernel knows what they compute."""
    if isinstance(rule, GatedDeltaRule):
        return type(rule.decay) is GatedRule
    if isinstance(rule, DeltaAndAverageRule):
        maps = type(rule.query_map), type(rule.key_map)
        usual = type(rule.delta), type(rule.average), *maps, rule.average.shape.key_width
        kinds = GatedDeltaRule, KeptRule, SoftmaxOfProjection, SoftmaxOfProjection, rule.key_map.width
        return usual == kinds and _has_usual_parts(rule.delta)
    return True


def _gates(rule: Any) -> tuple[Any, Any, Any]:
    """Of the key side, of the value side and of an average beside, None for one it lacks.

    The delta rules have their strength on the value side.
    """
    if isinstance(rule, DeltaAndAverageRule):
        return *_gates(rule.delta)[:2], rule.average.key_gate
    if isinstance(rule, DeltaRule):
        return (rule.decay.key_gate if isinstance(rule, GatedDeltaRule) else None), rule.write_gate, None
    return getattr(rule, "key_gate", None), getattr(rule, "value_gate", None), None


def _head_norms(attention: FastWeightAttention | _Softmax) -> list[Any]:
    """Of queries and of keys, or none."""
    names = (getattr(attention.projections, name, None) for name in ("q_norm", "k_norm"))
    return [attention.get_submodule(name) for name in names if name is not None]


def _inner(projections: Any) -> tuple[str, ...]:
    """The layers that make queries, keys and values."""
    split = isinstance(projections, SplitProjections)
    return (projections.q, projections.k, projections.v) if split else (projections.qkv,)


def forget_steps(model: nn.Module) -> None:
    """Let go of what a model keeps for its steps, such as matrices that are to be in few bits."""
    model.__dict__.pop(_DECODER, None)


class Decoder:
    """The steps of one model, with room for what lies between two operations; not copied with the model.

    Args:
        model: one that `why_plain` has nothing against.
    """

    def __init__(self, model: FastWeightsForCausalLM) -> None:
        self.lock = threading.Lock()
        self.model, self.base = model, model.model.base
        self.family = _FAMILIES[model.config.base.model_type]
        row = model.model.architecture
        self.embed = self.base.get_submodule(self.family.embed)
        self._positions = None if row.positions is None else position_vectors(self.base, row)
        """What is added to the embedding at each position, or at all."""
        self.kernels: Any = load_kernels("decoding")
        self.rotaries = _rotaries(model)
        self._angles: dict[int, list[Tensor]] = {}
        """Of the tokens from some places on."""
        # Frequencies that change with a text's length, as those of unconverted layers may, are of one token each.
        kinds = getattr(getattr(self.base, row.rotary or "", None), "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        self._at_once = 1 if {"dynamic", "longrope"} & {*kinds} else _ANGLES
        self.rooms: dict[int, Room] = {}
        self._watched = _Watch(model)

    def __reduce__(self) -> Any:
        return type(None), ()

    def room(self, rows: int) -> Room:
        """For so many rows; there are a few."""
        if rows not in self.rooms:
            while len(self.rooms) >= _ROOMS:
                self.rooms.pop(next(iter(self.rooms)))
            self.rooms[rows] = Room(self, rows)
            self._watched = _Watch(self.model)  # as some weights were joined
        return self.rooms[rows]

    def is_current(self) -> bool:
        """Whether the model is the one that this was made for."""
        return self._watched.is_current()

    @torch.no_grad()
    def step(
        self, ids: Int[Tensor, "B 1"], state: DecodingState, cache: FastWeightsCache
    ) -> Float[Tensor, "B 1 vocabulary"]:
        """Logits after this token, which becomes part of the state.

        Args:
            ids: the token of each row.
            state: of the layers, changed in place.
            cache: which it is of, and that of a Fast Weight Layer.
        """
        room = state.room
        room.x.copy_(self.embed(ids[:, 0]))
        if self._positions is not None:
            room.x += self._positions[min(state.tokens, len(self._positions) - 1)]
        room.more.zero_()
        self._rotate(room, state.tokens)
        for layer, attend in zip(room.layers, state.attends, strict=True):
            layer(state.tokens, attend)
        room.normalise(room.last_norm)
        state.read_one()
        if self.model.fast_weight_layer is None:
            return self.model.lm_head(room.normed)[:, None]
        hidden = room.normed[:, None].clone()  # of which the layer keeps what has no label yet
        decoder = self.model.model
        return self.model.lm_head(decoder.read_and_learn(hidden, decoder.lesson(ids, None, None, cache)))

    def _rotate(self, room: Room, tokens: int) -> None:
        """Cosines and sines of this position; for each window, where sinks are seen from, and back from what leaves."""
        if any(rotary.shape[2] for rotary in room.rotaries):
            first = tokens - tokens % self._at_once
            if first not in self._angles:
                while len(self._angles) >= _ROOMS:
                    self._angles.pop(next(iter(self._angles)))
                self._angles[first] = self._angles_from(first, room)
            for rotary, angles in zip(room.rotaries, self._angles[first], strict=True):
                rotary.copy_(angles[tokens - first])

    def _angles_from(self, first: int, room: Room) -> list[Float[Tensor, "N _ 2 width"]]:
        """Of each kind, for so many tokens from this one on."""
        tokens, found = torch.arange(first, first + self._at_once), []
        for rotary, (arguments, windows) in zip(room.rotaries, self.rotaries.items(), strict=True):
            reach = (tokens.clamp(max=window + self.model.config.sinks - 1) for window in windows)
            left = (tokens - window + 1 for window in windows)
            positions = torch.stack([tokens, *reach, *left], 1)
            angles = rotary.new_zeros(*positions.shape, *rotary.shape[1:])
            if rotary.shape[2]:
                turns = self.base.rotary_emb(room.x, positions.view(1, -1), *arguments)  # type: ignore[operator]
                angles[:, :, 0], angles[:, :, 1] = (x.view(*positions.shape, -1) for x in turns)
                if self.model.model._takes_rotary_off:
                    last = angles[:, 1 + len(windows) :]
                    last[:, :, 0], last[:, :, 1] = inverse_rotation(last[:, :, 0], last[:, :, 1])
            found.append(angles)
        return found


def _rotaries(model: FastWeightsForCausalLM) -> dict[tuple[str, ...], list[int]]:
    """What the maker of rotary embeddings is told, each with the windows of the layers that have what it makes then."""
    found: dict[tuple[str, ...], set[int]] = {}
    for i, window in enumerate(model.config.windows):
        found.setdefault(_rotary_arguments(model, i), set()).add(window)
    return {arguments: sorted(windows - {0}) for arguments, windows in found.items()}


def _rotary_arguments(model: FastWeightsForCausalLM, layer: int) -> tuple[str, ...]:
    """Of a family that has more than one rotary embedding, the kind of a layer."""
    return (model.config.base.layer_types[layer],) if model.model.architecture.rotary_arguments else ()


class DecodingState:
    """Where a text is, and the arguments of each layer's kernel for it: weights, and parts of a cache.

    Args:
        decoder: that goes on from there.
        layers: of a cache, whose windows are rings from now on.
        windows: of these, rings where they have fast weights beside; None for a layer without a window.
        rows: of the cache.
    """

    def __init__(
        self, decoder: Decoder, layers: list[Any], windows: list[Ring | GrowingWindow | None], rows: int
    ) -> None:
        self.decoder, self.room, self.rows = decoder, decoder.room(rows), rows
        self._layers, self._windows = layers, windows
        self._recurrent = [layer for layer in layers if isinstance(layer, _OURS)]
        self._growing = [window for window in windows if isinstance(window, GrowingWindow)]
        self._rings = [window for window in windows if isinstance(window, Ring)]
        self._counting = [layer for layer in layers if isinstance(layer, Counting)]
        self.tokens = _position(layers)
        """Of their document that all rows have read."""
        self._fast = [layer.own_state() if isinstance(layer, _OURS) else None for layer in layers]
        steps = zip(layers, self.room.layers, strict=True)
        self._tails = [None if step.attention.convolution is None else layer.own_tail() for layer, step in steps]
        kept = zip(self.room.layers, self._fast, self._tails, windows, strict=True)
        self.attends = [
            step.attend(fast, tail, window.ring() if isinstance(window, GrowingWindow) else window)
            for step, fast, tail, window in kept
        ]

    def __reduce__(self) -> Any:
        return type(None), ()

    def has_room(self, tokens: int) -> bool:
        """For so many more, in the layers that keep all."""
        return all(self.tokens + tokens <= window.room for window in self._growing)

    def read_one(self) -> None:
        """Count a token."""
        self.tokens += 1
        for layer in self._counting:
            layer.cumulative_length += 1
        for ring in self._rings:
            ring.tokens += 1
        for window in self._growing:
            window.show(self.tokens)

    def is_current(self, cache: FastWeightsCache, rows: int) -> bool:
        """Whether nothing else has changed the cache, nor taken the decoder's room."""
        if rows != self.rows or self.decoder.rooms.get(rows) is not self.room or not self.decoder.is_current():
            return False
        if self.tokens != _position(self._layers) or not all(x.has_previous_state[0] for x in self._recurrent[:1]):
            return False
        kept = zip(cache.layers, self._layers, self._fast, self._tails, self._windows, strict=False)
        return all(window.is_current() for window in self._growing) and all(
            layer is ours
            and (fast is None or layer.has_state(fast))  # type: ignore[attr-defined]
            and (tail is None or layer.conv_states[0] is tail)  # type: ignore[attr-defined]
            and (not isinstance(window, Ring) or layer.ring is window)  # type: ignore[attr-defined]
            for layer, ours, fast, tail, window in kept
        )


class Room:
    """What lies between two operations of a step, for so many rows, and the steps of all layers.

    Args:
        decoder: of a model.
        rows: B.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.rows, self.kernels = rows, decoder.kernels
        model, family = decoder.model, decoder.family
        config = model.config
        base: Any = decoder.base
        self.x, self.more, self.normed = (_zeros(rows, config.hidden_size) for _ in range(3))
        self.arrays = [x.numpy() for x in (self.x, self.more, self.normed)]
        self.nothing = _zeros(rows, config.hidden_size).numpy()
        self.given = self.normed if family.norms else self.x
        """What attention and unit read."""
        self.parallel = family.parallel is not None and bool(getattr(config.base, family.parallel))
        self.aside, self.again = (_zeros(rows, config.hidden_size if self.parallel else 0) for _ in range(2))
        """Where a unit reads what attention reads: what it is given, and what it says."""
        self.last_norm = _norm(base.get_submodule(family.last_norm))
        attentions = _all_attentions(model)
        self.rotaries = []
        """Of each kind: cosines and sines of the token, of queries for the sinks of each window, and back from the key
        that leaves it."""
        rotates = model.model.architecture.rotary is not None and any(attention.rotates for attention in attentions)
        for arguments, windows in decoder.rotaries.items():
            first = base.rotary_emb(self.x, _zeros(1, 1, dtype=torch.long), *arguments)[0] if rotates else self.x[:, :0]
            self.rotaries.append(_zeros(1 + 2 * len(windows), 2, first.shape[-1]))
        kinds = [*decoder.rotaries]
        self.unit = getattr(self.kernels, family.units[getattr(config.base, family.activation)])
        layers = zip(base.get_submodule(family.layers), attentions, strict=True)
        self.layers = []
        for i, (layer, attention) in enumerate(layers):
            arguments = _rotary_arguments(model, i)
            rotary, windows = self.rotaries[kinds.index(arguments)], decoder.rotaries[arguments]
            place = 1 + windows.index(attention.window) if attention.window else 0
            places = 0, place, place + len(windows) if attention.window else 0
            self.layers.append(LayerStep(self, family, layer, attention, [rotary[place] for place in places]))

    def normalise(self, norm: _Norm | None) -> None:
        """Add what a layer's part has said to the residual stream, and normalise it for the next, if that wants it."""
        if norm is None:
            self.x.add_(self.more)
        else:
            x, more, normed = self.arrays
            self.kernels.add_and_normalise(x, more, *norm, normed)

    def normalise_said(self, norm: _Norm) -> None:
        """Normalise what a layer's part has said, before it is added."""
        said = self.arrays[1]
        self.kernels.add_and_normalise(said, self.nothing, *norm, said)

    def normalise_aside(self, norm: _Norm) -> None:
        """Normalise the residual stream as it is, for a unit beside attention."""
        self.kernels.add_and_normalise(self.arrays[0], self.nothing, *norm, self.aside.numpy())


class LayerStep:
    """One layer's part of a step.

    Args:
        room: for what comes in and goes out.
        family: whose parts the layer has.
        layer: of the model.
        attention: its attention, converted or not.
        rotary: (2, width) cosines and sines of the token, of queries for its sinks, and back from the key that leaves.
    """

    def __init__(self, room: Room, family: _Family, layer: Any, attention: Any, rotary: list[Tensor]) -> None:
        self.room, self.attention = room, attention
        self.norms = [_norm(layer.get_submodule(name)) for name in family.norms] or [None, None]
        self.norms_after = [_norm(layer.get_submodule(name)) for name in family.norms_after]
        rows, D = room.rows, attention.head_dim
        rule: Any = attention.rule
        V = D if rule is None else rule.shape.value_width
        H, G = attention.heads, attention.kv_heads
        used = attention.rotates, attention.rotates, attention.takes_rotary_off
        self.rotary = [(x if each else _zeros(2, 0)).numpy() for x, each in zip(rotary, used, strict=True)]
        names: Any = attention.projections
        modules = [attention.get_submodule(name) for name in _inner(names)]
        shapes = (H, D), (G, D), (G, V)
        each = H if isinstance(names, InterleavedProjections) else 1
        self.project = _Products(room.given, modules, sizes=[heads * width for heads, width in shapes], each=each)
        self.made = [x.view(rows, *shape).numpy() for x, shape in zip(self.project.outputs, shapes, strict=True)]
        self.read = _zeros(rows, H, V)
        self.output = _Products(self.read.view(rows, -1), [attention.get_submodule(names.out)], [room.more])
        norms = [_norm(norm) for norm in _head_norms(attention)]
        self.joint_norms = []
        """Of all queries, and of all keys, at once: these, nothing to add, and the norm."""
        if isinstance(names, JointlyNormalisedProjections):
            parts = [x.numpy() for x in self.project.outputs[:2]]
            self.joint_norms = [(x, x * 0, norm) for x, norm in zip(parts, norms, strict=True)]
            norms = []
        self.head_norms = norms or [_norm(None)] * 2
        self.gates = [_Gate(gate, room.given) for gate in _gates(rule)]
        self.gate_products = [gate.product for gate in self.gates if gate.product is not None]
        unit: Any = layer.get_submodule(family.unit)
        contract = unit.get_submodule(family.contract)
        width, _ = _sizes(contract)
        parts = [unit.get_submodule(name) for name in family.expand]
        given, said = (room.aside, room.again) if room.parallel else (room.given, room.more)
        self.expand = _Products(given, parts, sizes=[width] * (2 if family.gated else 1))
        result = _zeros(rows, width)
        self.unit = [x.numpy() for x in (*self.expand.outputs, result)]
        self.contract = _Products(result, [contract], [said])

    def __call__(self, tokens: int, attend: _Attend) -> None:
        """From the residual stream to what the layer adds to it.

        Args:
            tokens: before this one.
            attend: what this layer is given of a text.
        """
        room = self.room
        room.normalise(self.norms[0])
        if room.parallel:
            room.normalise_aside(self.norms[1])  # type: ignore[arg-type]
        self.project()
        for x, nothing, norm in self.joint_norms:
            room.kernels.add_and_normalise(x, nothing, *norm, x)
        for product in self.gate_products:
            product()
        attend(tokens)
        self.output()
        if self.norms_after:
            room.normalise_said(self.norms_after[0])
        if not room.parallel:
            room.normalise(self.norms[1])
        self.expand()
        room.unit(*self.unit)
        self.contract()
        if self.norms_after:
            room.normalise_said(self.norms_after[1])
        if room.parallel:
            room.more.add_(room.again)

    def attend(
        self,
        fast: Float[Tensor, "B G K V"] | EightBits | None,
        tail: Float[Tensor, "B C N"] | None,
        ring: Ring | None,
    ) -> _Attend:
        """What reads and changes such a state, for the number of tokens before."""
        attention, room = self.attention, self.room
        state_in_bits = [_NO_CODES] * 2
        if isinstance(fast, EightBits):
            state_in_bits = [fast.codes.numpy(), fast.exponents.numpy()]
        if not isinstance(fast, torch.Tensor):
            fast = _zeros(room.rows, attention.kv_heads, 0, attention.head_dim)
        window, in_bits = [_EMPTY[4]] * 4, [_NO_CODES] * 4
        if ring is not None:
            window = [x.numpy() for x in (ring.k, ring.v, ring.sink_k, ring.sink_v)]
            if ring.k.dtype == torch.int8:
                in_bits = [*window[:2], ring.k_exponents.numpy(), ring.v_exponents.numpy()]
                window[:2] = [_EMPTY[4]] * 2
        taps, tails = _EMPTY[3], _EMPTY[4]
        if tail is not None:
            heads = attention.heads + 2 * attention.kv_heads, attention.head_dim
            taps = attention.convolution.weight.detach().unflatten(0, heads).numpy()
            tails = tail.unflatten(1, heads).numpy()
        scales = attention.fast_scale, attention.fast_unit, attention.window_scale
        scales = [_EMPTY[1] if x is None else x.detach().numpy() for x in scales]
        *gates, mean_gate = (gate.arrays for gate in self.gates)
        gates = [array for arrays in gates for array in arrays]
        maps = [_map(x) for x in (attention.query_map, attention.key_map, attention.value_map)]
        mean = [_EMPTY[2], _EMPTY[2], _EMPTY[1]]
        if isinstance(rule := attention.rule, DeltaAndAverageRule):
            mean = [_map(rule.query_map), _map(rule.key_map), rule.share.detach().numpy()]
        bias = _EMPTY[2] if attention.window_bias is None else attention.window_bias.detach().numpy()
        norm = self.head_norms[0]
        numbers = torch.tensor([norm.epsilon, norm.offset, attention.scaling], dtype=torch.float32).numpy()
        head_norms = [norm.weight for norm in self.head_norms]
        arrays = [*self.made, room.given.numpy(), *self.rotary, *head_norms, taps, tails, *gates, *maps, fast.numpy()]
        arrays += [*window, *scales, bias, numbers, self.read.numpy(), *mean_gate, *mean, *_mix(attention.mix_gate)]
        in_bits += state_in_bits
        arrays += in_bits
        flags = {
            "rotated_fast": attention.rotary,
            "leaving": attention.writes_leaving,
            "averages": isinstance(rule, AverageRule),
            "normed": norm.weight.size > 0,
            "delta": isinstance(rule, DeltaRule | DeltaAndAverageRule),
        }
        work = fast.numel() + sum(x.size for x in (*window, *in_bits))
        return _Attend(room.kernels, arrays, flags, work=work)


def _mix(gate: MixGate | None) -> list[Any]:
    """The matrix, the bias and the share of a window; empty where there is none."""
    parts = (None, None, None) if gate is None else (gate.gate.weight, gate.gate.bias, gate.share)
    return [_EMPTY[n] if part is None else part.detach().numpy() for n, part in zip((2, 1, 1), parts, strict=True)]


def _map(feature_map: Any) -> Any:
    """The matrices of all heads, one beneath the other; empty for a map that has none."""
    if not isinstance(feature_map, Projection | SoftmaxOfProjection):
        return _EMPTY[2]
    return feature_map.weight.detach().flatten(0, 1).numpy()


class _Attend:
    """The kernel `attend` of one layer and one text.

    Args:
        kernels: that have it.
        arrays: in the order of its record.
        flags: by name.
        work: numbers that are read.
    """

    def __init__(self, kernels: Any, arrays: list[Any], flags: dict[str, bool], work: int) -> None:
        kinds = ["float32"] * (len(arrays) - 6) + ["int8"] * 6
        assert all(x.flags.c_contiguous and x.dtype == kind for x, kind in zip(arrays, kinds, strict=True))
        self._arrays = arrays  # the record does not keep them alive
        self._record = kernels.record_of(arrays, flags)
        self._address = self._record.buffer_info()[0]
        self._task, self._team = task_of(kernels.attend), work >= _WORTH_A_TEAM

    def __call__(self, tokens: int) -> None:
        """One more token, after so many."""
        self._record[0], self._record[1] = 0, tokens
        run_on_team(self._task, self._address, torch.get_num_threads() if self._team else 1)


class _Gate:
    """What the kernel is given of a rule's gate: both matrices of one of low rank, else what its only matrix makes."""

    def __init__(self, gate: Any, x: Float[Tensor, "B d"]) -> None:
        self.product = None
        self.arrays = [_zeros(len(x), 0).numpy(), _EMPTY[2], _EMPTY[2], _EMPTY[1]]
        """(B, _) what is made here, (rank, d) and (_, rank) the two matrices, and the bias."""
        if isinstance(gate, LowRank):
            weights = gate.down.weight, gate.up.weight, gate.up.bias
            self.arrays[1:] = (weight.detach().numpy() for weight in weights)
        elif gate is not None:
            self.product = _Products(x, [gate])
            self.arrays = [self.product.outputs[0].numpy(), _EMPTY[2], _EMPTY[2], gate.bias.detach().numpy()]


class _Products:
    """The same rows times the matrices of several layers.

    Args:
        x: the rows, whose numbers change.
        layers: linear ones; one alone may make several outputs.
        outputs: where the products go; by default new places, which are next to each other if there is one row.
        sizes: of the outputs; by default of one for each layer.
        each: a layer that makes several outputs makes so many equal parts of each in turn (a head's query, key and
            value, then the next head's).
    """

    def __init__(
        self,
        x: Float[Tensor, "B n"],
        layers: list[Any],
        outputs: list[Tensor] | None = None,
        sizes: list[int] | None = None,
        each: int = 1,
    ) -> None:
        self.x = x
        sizes = [_sizes(layer)[1] for layer in layers] if sizes is None else sizes
        if outputs is None and len(x) == 1:
            outputs = [*_zeros(1, sum(sizes)).split(sizes, 1)]
        self.outputs = [_zeros(len(x), size) for size in sizes] if outputs is None else outputs
        few_bits = all(isinstance(layer, QuantisedLinear) for layer in layers)
        if few_bits and len(layers) > 1 and (joined := type(layers[0]).join(layers)) is not None:
            layers = [joined]
        self._copied = []
        """Of products that are made in another place: that, and their own."""
        if len(sizes) == len(layers):
            places = self.outputs
        elif len(x) == 1 and each == 1:
            places = [self.outputs[0].as_strided((1, sum(sizes)), (sum(sizes), 1))]
        else:
            places = [_zeros(len(x), sum(sizes))]
            parts = places[0].view(len(x), each, -1).split([size // each for size in sizes], 2)
            own = [output.view(len(x), each, -1) for output in self.outputs]
            self._copied = list(zip(parts, own, strict=True))
        self._pairs = list(zip(layers, places, strict=True))
        self._products = None
        """Of few rows with layers of few bits: what makes each output, before its bias."""
        if few_bits and len(x) <= FEW:
            self._products = [(layer.product(x, output), output, layer.bias) for layer, output in self._pairs]

    def __call__(self) -> None:
        """Multiply."""
        if self._products is None:
            x = self.x
            for layer, output in self._pairs:
                output.copy_(layer(x) if isinstance(layer, QuantisedLinear) else linear(x, _matrix(layer), layer.bias))
        else:
            for multiply, output, bias in self._products:
                multiply()
                if bias is not None:
                    output.add_(bias)
        for part, output in self._copied:
            output.copy_(part)


def _matrix(layer: nn.Linear | Conv1D) -> Float[Tensor, "m n"]:
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


def _sizes(layer: Any) -> tuple[int, int]:
    """Of its inputs and its outputs."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


_EMPTY = {n: torch.zeros((0,) * n, dtype=torch.float32).numpy() for n in (1, 2, 3, 4)}
_NO_CODES = torch.zeros((0,) * 4, dtype=torch.int8).numpy()


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whatever torch's default dtype is."""
    return torch.zeros(*shape, dtype=dtype)


def _begin(model: FastWeightsForCausalLM, cache: FastWeightsCache, rows: int) -> DecodingState | None:
    if not cache.fits(model.config) or cache.padded or cache.several_documents:
        return None
    kinds = model.config.layer_types
    layers: list[Any] = cache.layers[: len(kinds)]
    others = len(cache.layers) - len(layers)  # of a Fast Weight Layer, or none
    recurrent = [layer for layer in layers if isinstance(layer, _OURS)]
    if others != (cache.block is not None):
        return None
    for layer, attention in zip(recurrent, model.fast_attentions(), strict=True):
        if layer.state_shape != (rows, *attention.rule.state_shape):
            return None
    shape, windows = (rows, _position(layers)), local_windows(model.config.base)
    softmax = [(layer, x) for layer, x in zip(layers, windows, strict=True) if not isinstance(layer, _OURS)]
    if softmax and cache.reordered:
        return None  # each step of a beam would copy all keys and values twice
    if not all(_holds(layer, window, *shape) for layer, window in softmax):
        return None
    decoder: Decoder | None = model.__dict__.get(_DECODER)
    if decoder is None or decoder.model is not model or not decoder.is_current():
        if why_plain(model) is not None:
            return None
        decoder = model.__dict__[_DECODER] = Decoder(model)
    cache.about_to_read()
    if any(layer.as_ring() is None for layer in layers if isinstance(layer, Windowed)):
        return None
    return DecodingState(decoder, layers, [_window(layer) for layer in layers], rows)


def _position(layers: list[Any]) -> int:
    """Of the next token, as these layers of a cache have it."""
    counting = next((layer for layer in layers if isinstance(layer, Counting)), None)
    return layers[0].get_seq_length() if counting is None else counting.next_position


def _window(layer: Any) -> Ring | GrowingWindow | None:
    """Of a layer of a cache, where single tokens are written."""
    if isinstance(layer, Windowed):
        return layer.ring
    return None if isinstance(layer, PureCacheLayer) else GrowingWindow(layer)


def _holds(layer: DynamicLayer, window: int | None, rows: int, tokens: int) -> bool:
    """Whether a softmax layer has keys and values of just these, or of the last of them if it has a window."""
    if isinstance(layer, KeepsKeysAndValues):
        shape, dtype = layer.kept_shape, layer.kept_dtype
    else:
        shape, dtype = (None, None) if layer.keys is None else (layer.keys.shape, layer.keys.dtype)
    if shape is None or dtype != torch.float32 or shape[0] != rows:
        return False
    if window is None:
        return type(layer) in (DynamicLayer, GrowingCacheLayer) and shape[2] == tokens
    if not isinstance(layer, SlidingCacheLayer) or layer.record_past:
        return False
    return (layer.sliding_window, layer.next_position) == (window, tokens)


class _Norm(NamedTuple):
    """What a kernel is given of one."""

    weight: Any
    bias: Any
    """Of width 0 for a norm that does not centre."""
    epsilon: float
    offset: float
    """Added to its weight."""


def _norm(norm: Any) -> _Norm:
    """What a kernel is given of a module; of None, that there is nothing to normalise."""
    if norm is None:
        return _Norm(_EMPTY[1], _EMPTY[1], 0.0, 0.0)
    weight = norm.weight.detach().numpy()
    if isinstance(norm, nn.LayerNorm):
        return _Norm(weight, norm.bias.detach().numpy(), norm.eps, 0.0)
    numbers = _rms_numbers(norm)
    assert numbers is not None
    return _Norm(weight, _EMPTY[1], *numbers)


def _rms_numbers(norm: Any) -> tuple[float, float] | None:
    """Epsilon of a norm by the root of the mean square, and what it adds to its weight; None for another kind."""
    kind = type(norm).__name__
    if kind == "Gemma3RMSNorm":
        return norm.eps, 1.0
    return (norm.variance_epsilon, 0.0) if kind.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") else None


class _Watch:
    """Which modules a model has, and where their numbers are: so little that each token can ask for it.

    Args:
        model: as it is now.
    """

    def __init__(self, model: FastWeightsForCausalLM) -> None:
        modules = [*model.modules()]
        tables = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        kept = [(table, name, x) for table in tables for name, x in table.items()]
        kept += [(vars(m), "forward", vars(m).get("forward")) for m in modules]
        self._tables, self._names, self._things = zip(*kept, strict=True)
        self._places_of = [x.data_ptr for x in self._things if isinstance(x, torch.Tensor)]
        self._places = [place() for place in self._places_of]
        self._dropouts = [
            m for m in modules if isinstance(m, nn.Dropout) or any(hasattr(m, name) for name in _DROPOUTS)
        ]
        self._config: Any = model.model.base.config
        self._implementation = self._config._attn_implementation
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def is_current(self) -> bool:
        """Whether all of it is as it was, and there are no hooks, no dropout and no other kind of attention."""
        return (
            not any(self._hooks)
            and self._config._attn_implementation == self._implementation
            and not any(_drops_out(module) for module in self._dropouts)
            and all(map(is_, map(dict.get, self._tables, self._names), self._things))
            and [place() for place in self._places_of] == self._places
        )
