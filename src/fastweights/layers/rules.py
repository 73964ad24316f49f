"""Update rules: what a head's fast weights do with each token. One class each, one row in `RULES`.

A rule owns its parameters and how they start, makes its gates, keeps padding and document borders out of its state,
calls its op, divides by its normaliser, and knows the shape of its state. Everything else about a layer (projections,
window, mix) is not its business.

Notation: B batch, T time, d width of the model, H query heads, G key/value heads, K width of a key after the feature
map, V width of a value, S state (B, G, K, W) with W = V, or V + 1 with a normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import logsigmoid, normalize, pad

from fastweights.errors import check_name
from fastweights.layers.feature_maps import SoftmaxOfProjection
from fastweights.layers.precision import Float32Linear, KeepsFloat32
from fastweights.ops import decay_rule, delta_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True)
class RuleShape:
    """Sizes of one layer, and what a rule may be told about its gates."""

    hidden_size: int
    heads: int
    """Of queries."""
    kv_heads: int
    key_width: int
    """After the feature map."""
    value_width: int
    value_gate: bool
    """Whether a rule with gates on both sides has the one on the value side."""
    gate_bias: tuple[float, float]
    """First and last gate bias of a head: time constants start spread between e^first and e^last tokens."""
    gate_rank: int = 0
    """Rank of a gate's matrix; 0 for a full one."""
    write_bias: tuple[float, float] = (0.0, 0.0)
    """First and last bias of a head's write gate, in the rules that have one."""
    features: int | None = None
    """Rows of the learned matrices of a rule that has feature maps of its own; by default as many as a key is wide."""
    normaliser: bool = False
    """Whether what is read is divided by the sum of its weights, which must not be negative."""


class TokenMarks(NamedTuple):
    """What is special about the tokens of one call."""

    real: Bool[Tensor, "B T"] | None = None
    """False where a token is padding, which leaves the state bit for bit as it is; None if none is."""
    starts: Bool[Tensor, "B T"] | None = None
    """True where a document begins, before which the state forgets everything; None if none does."""


class Rule(nn.Module):
    """S_t = (f_t z_tᵀ) ⊙ S_{t-1} + k_t v_tᵀ, with the gates that a subclass makes, or none.

    A rule that writes under other keys overrides `written`; one with another recurrence `update`, which padding and
    borders of documents reach as keys, values and gates.

    With a normaliser, what is read is the average Sᵀq / (q·z) of values and no sum of them, with z the sum of keys that
    S is of keys times values. It is one more column of S, as if each value had a 1 behind it, so that caches, padding
    and documents need not know of it. A query that matches no key, q·z = 0, reads 0; below 1e-6 it reads in proportion.

    Args:
        shape: sizes of the layer.
    """

    settings: tuple[str, ...] = ()
    """Those of a conversion that speak of its gates."""
    normalises = False
    """Whether it has a normaliser, by its paper, where the feature map is nowhere negative."""
    learns_features = False
    """Whether it has feature maps of its own."""

    def __init__(self, shape: RuleShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(G, K, V) of the state of one row."""
        return self.shape.kv_heads, self.shape.key_width, self.shape.value_width + self.shape.normaliser

    def reset_parameters(self) -> None:
        """Start as a new rule."""

    def log_gates(
        self, x: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B T G Kf"] | None, Float[Tensor, "B T G Vz"] | None]:
        """Log gates of the key side and of the value side, in fp32; None for a gate of 1."""
        return None, None

    def written(
        self, k: Float[Tensor, "B T G K"], key_gate: Float[Tensor, "B T G Kf"] | None
    ) -> Float[Tensor, "B T G K"]:
        """The key under which a token's value is written."""
        return k

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T G K"],
        v: Float[Tensor, "B T G V"],
        *,
        scale: float,
        marks: TokenMarks,
        state: Float[Tensor, "B G K W"] | None,
        keep_state: bool,
        inclusive: bool = True,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G K W"] | None]:
        """What the state says to each query, after the write; and the state after the last token.

        Args:
            x: the layer's input, which gates are made of.
            q: queries, after the feature map.
            k: keys, after the feature map.
            v: values.
            scale: factor on what is read, which a normaliser takes out again.
            marks: padding and borders of documents.
            state: to start from, of `state_shape`; by default 0.
            keep_state: whether the state is wanted.
            inclusive: whether a token reads the state after its own decay and write, or before both.
        """
        dtype = v.dtype
        if self.shape.normaliser:
            v, scale = _with_ones(v), 1.0
        key_gate, value_gate = self.log_gates(x)
        k = self.written(k, key_gate)
        if marks.real is not None:
            padding = ~marks.real[..., None, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
            key_gate = None if key_gate is None else key_gate.masked_fill(padding, 0)
            value_gate = None if value_gate is None else value_gate.masked_fill(padding, 0)
            x = x.masked_fill(padding[..., 0], 0)
        if marks.starts is not None:
            if key_gate is None:
                key_gate = x.new_zeros(*k.shape[:3], 1, dtype=torch.float32)
            key_gate = key_gate.masked_fill(marks.starts[..., None, None], -torch.inf)
        o, state = self.update(
            x, q, k, v, key_gate, value_gate, scale=scale, state=state, keep_state=keep_state, inclusive=inclusive
        )
        if marks.starts is not None and not inclusive:
            # Its first token reads what the document before has left.
            o = o.masked_fill(marks.starts[..., None, None], 0)
        return _normalised(o).to(dtype) if self.shape.normaliser else o, state

    def update(
        self,
        x: Float[Tensor, "B T d"],
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T G K"],
        v: Float[Tensor, "B T G V"],
        key_gate: Float[Tensor, "B T G Kf"] | None,
        value_gate: Float[Tensor, "B T G Vz"] | None,
        *,
        scale: float,
        state: Float[Tensor, "B G K V"] | None,
        keep_state: bool,
        inclusive: bool = True,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G K V"] | None]:
        """Run the op. A token with k = v = 0 and log gates 0 must leave the state as it is, -inf must empty it first.

        Args:
            x: the layer's input; 0 where a token is padding, as one that is not finite would reach the state.
            q: queries, after the feature map.
            k: keys, after the feature map; 0 where a token is padding.
            v: values; 0 where a token is padding.
            key_gate: log gate of the key side, -inf where a document begins; None for a gate of 1.
            value_gate: log gate of the value side.
            scale: factor on what is read.
            state: to start from; by default 0.
            keep_state: whether the state is wanted.
            inclusive: whether a token reads the state after its own decay and write, or before both.

        Returns:
            What is read, and the state after the last token.
        """
        return decay_rule(
            q,
            k,
            v,
            key_gate,
            value_gate,
            scale=scale,
            initial_state=state,
            output_final_state=keep_state,
            inclusive=inclusive,
        )


# As Katharopoulos et al. add to it.
_LEAST_WEIGHT = 1e-6


def _with_ones(v: Float[Tensor, "B T G V"]) -> Float[Tensor, "B T G V+1"]:
    """In float32 at least, so that what is divided was not rounded."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    return torch.cat((v, v.new_ones(*v.shape[:3], 1)), -1)


def _normalised(o: Float[Tensor, "B T H _"]) -> Float[Tensor, "B T H V"]:
    """The last column is the sum of the weights that the others were summed with."""
    return o[..., :-1] / o[..., -1:].clamp(min=_LEAST_WEIGHT)


class AddRule(Rule):
    """S_t = S_{t-1} + k_t v_tᵀ: nothing is forgotten.

    Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236); their normaliser needs a feature map that is
    nowhere negative.
    """

    normalises = True


class LowRank(nn.Module):
    """W x + b with W = up · down of low rank, in float32.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: of W.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = Float32Linear(in_features, rank, bias=False)
        self.up = Float32Linear(rank, out_features)

    def forward(self, x: Float[Tensor, "B T n"]) -> Float[Tensor, "B T m"]:
        """Float32, whatever it is given."""
        return self.up(self.down(x))


def _gate(shape: RuleShape, width: int) -> Float32Linear | LowRank:
    sizes = shape.hidden_size, shape.kv_heads * width
    return LowRank(*sizes, shape.gate_rank) if shape.gate_rank else Float32Linear(*sizes)


@torch.no_grad()
def _start(gate: Float32Linear | LowRank, bias: Callable[[int], Tensor]) -> None:
    """A gate that is the same for each input: that of its bias, which is made for so many outputs."""
    if isinstance(gate, LowRank):
        gate.down.reset_parameters()
        gate = gate.up
    gate.weight.zero_()
    gate.bias.copy_(bias(gate.out_features))


def _spread(ends: tuple[float, float], heads: int) -> Float[Tensor, " G"]:
    """From one end to the other; a single head is half way."""
    first, last = ends
    return torch.linspace(first, last, heads) if heads > 1 else torch.tensor([(first + last) / 2])


class DecayRule(Rule):
    """Both sides of the state decay by gates that each token sets.

        f_t = sigmoid(W_f x_t + b_f)    key side
        z_t = sigmoid(W_z x_t + b_z)    value side

    H. H. Mao, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights", EMNLP 2022 (arXiv 2210.04243).

    Args:
        shape: sizes of the layer.
    """

    settings = ("value_gate", "gate_bias", "gate_rank")

    def __init__(self, shape: RuleShape) -> None:
        super().__init__(shape)
        self.key_gate = _gate(shape, shape.key_width)
        self.value_gate = _gate(shape, shape.value_width) if shape.value_gate else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates that start independent of their input, with a spread of time constants in every head.

        Gu et al., "Improving the Gating Mechanism of Recurrent Neural Networks" (arXiv 1910.09890).
        """
        for gate in filter(None, (self.key_gate, self.value_gate)):
            _start(gate, lambda size: self._first_bias(size // self.shape.kv_heads))

    def _first_bias(self, width: int) -> Float[Tensor, " GX"]:
        return torch.linspace(*self.shape.gate_bias, width).repeat(self.shape.kv_heads)

    def log_gates(
        self, x: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B T G Kf"] | None, Float[Tensor, "B T G Vz"] | None]:
        """Both gates in log space and fp32; None for the value side without one."""
        key, value = (None if gate is None else self._log_gate(gate(x)) for gate in (self.key_gate, self.value_gate))
        return key, value

    def _log_gate(self, logits: Float[Tensor, "B T GX"]) -> Float[Tensor, "B T G X"]:
        # An adapter beside the gate may have its own dtype.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logsigmoid(logits).unflatten(-1, (self.shape.kv_heads, -1))


class AverageRule(DecayRule):
    """The decay rule, which writes under k_t ⊙ (1 - f_t): as much as it forgets.

    Fast weights are then averages over a time that each key channel sets, and no sums, which grow for as long as a
    channel remembers. The gated rule writes so, with one gate a head; Z. Qin et al., "HGRN2" (arXiv 2404.07904) with
    one a channel, in the place of keys.
    """

    def written(
        self, k: Float[Tensor, "B T G K"], key_gate: Float[Tensor, "B T G Kf"] | None
    ) -> Float[Tensor, "B T G K"]:
        """The key, each channel times what its gate lets go."""
        assert key_gate is not None
        return k * -torch.expm1(key_gate).to(k.dtype)


class GatedRule(AverageRule):
    """S_t = g_t S_{t-1} + (1 - g_t) k_t v_tᵀ with one gate a head, g_t = sigmoid(w·x_t + b).

    H. Peng et al., "Random Feature Attention" (arXiv 2103.02143), section 3.2.

    Args:
        shape: sizes of the layer.
    """

    settings = ("gate_bias", "gate_rank")
    normalises = True

    def __init__(self, shape: RuleShape) -> None:
        Rule.__init__(self, shape)
        self.key_gate, self.value_gate = _gate(shape, 1), None

    def _first_bias(self, width: int) -> Float[Tensor, " G"]:
        """Time constants are spread over the heads, where each has but one."""
        return _spread(self.shape.gate_bias, self.shape.kv_heads)


class DeltaRule(Rule):
    """S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ: what is written is what the value is beyond what S holds.

    Keys are brought to length 1, so that a state stays bounded; β_t = sigmoid(w·x_t + b), one a head, starts at 1/2.

    I. Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174); keys of length 1
    are from S. Yang et al., "Parallelizing Linear Transformers with the Delta Rule" (arXiv 2406.06484).

    Args:
        shape: sizes of the layer.
    """

    settings = ("gate_rank", "write_bias")

    def __init__(self, shape: RuleShape) -> None:
        super().__init__(shape)
        self.write_gate = _gate(shape, 1)

    def reset_parameters(self) -> None:
        """As new: each token writes as much of the difference as its head's bias says, half by default."""
        _start(self.write_gate, lambda heads: _spread(self.shape.write_bias, heads))

    def written(
        self, k: Float[Tensor, "B T G K"], key_gate: Float[Tensor, "B T G 1"] | None
    ) -> Float[Tensor, "B T G K"]:
        """The key, at length 1; one of 0, as maps may give, stays 0, which float16 could not tell from 0 / 0."""
        return normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1).to(k.dtype)

    def update(
        self,
        x: Float[Tensor, "B T d"],
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T G K"],
        v: Float[Tensor, "B T G V"],
        key_gate: Float[Tensor, "B T G 1"] | None,
        value_gate: None,
        *,
        scale: float,
        state: Float[Tensor, "B G K V"] | None,
        keep_state: bool,
        inclusive: bool = True,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G K V"] | None]:
        """By the delta rule, which needs no more than the keys of padding to be 0."""
        return delta_rule(
            q,
            k,
            v,
            self.write_gate(x).sigmoid()[..., None],
            key_gate,
            scale=scale,
            initial_state=state,
            output_final_state=keep_state,
            inclusive=inclusive,
        )


class GatedDeltaRule(DeltaRule):
    """S_t = a_t S_{t-1} + β_t k_t (v_t - a_t S_{t-1}ᵀ k_t)ᵀ with a gate a_t for each head, as in the gated rule.

    S. Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464).

    Args:
        shape: sizes of the layer.
    """

    settings = ("gate_bias", *DeltaRule.settings)

    def __init__(self, shape: RuleShape) -> None:
        super().__init__(shape)
        self.decay = GatedRule(shape)

    def reset_parameters(self) -> None:
        """As new: both gates start as those of the rules that they are from."""
        super().reset_parameters()
        self.decay.reset_parameters()

    def log_gates(self, x: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B T G 1"] | None, None]:
        """That of the gated rule."""
        return self.decay.log_gates(x)[0], None


class KeptRule(GatedRule):
    """The gated rule's decay, of tokens that are written whole: what they weigh against each other decides."""

    written = Rule.written


class DeltaAndAverageRule(KeepsFloat32, Rule):
    """The gated delta rule, and beside its state one of which a weighted average of values is read; both are added.

        y_t = D_tᵀ q_t + s (A_tᵀ φ(q_t)) / (φ(q_t)·z_t)
        A_t = g_t A_{t-1} + φ(k_t) v_tᵀ, z_t = g_t z_{t-1} + φ(k_t), φ(x) = [softmax(W x), softmax(-W x)]

    A head of softmax that looks one token up is what the delta rule does well; one that averages over a hundred is not,
    as each write takes from what similar keys have written. D is the gated delta rule's state; A is linear attention
    with the feature map of the Hedgehog (Zhang et al., arXiv 2402.04347), its normaliser, and one decay a head. W, one
    for queries and one for keys of each head, starts as the identity, and s, one a head, at 1. Ours.

    The state is that of the delta rule with A and z beneath it: three times as many rows, and a column for z. A has two
    rows for each of W, which may have more than columns.

    Args:
        shape: sizes of the layer.
    """

    settings = GatedDeltaRule.settings
    learns_features = True

    def __init__(self, shape: RuleShape) -> None:
        super().__init__(shape)
        self.delta = GatedDeltaRule(shape)
        self.query_map = SoftmaxOfProjection(shape.key_width, shape.heads, shape.features)
        self.key_map = SoftmaxOfProjection(shape.key_width, shape.kv_heads, shape.features)
        self.average = KeptRule(replace(shape, key_width=self.key_map.width, normaliser=True))
        self.share = nn.Parameter(torch.empty(shape.heads, dtype=torch.float32))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Both states, one beneath the other."""
        heads, features, width = self.average.state_shape
        return heads, self.shape.key_width + features, width

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As new: both are read as they are."""
        for part in (self.delta, self.average, self.query_map, self.key_map):
            part.reset_parameters()
        self.share.fill_(1.0)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T G K"],
        v: Float[Tensor, "B T G V"],
        *,
        state: Float[Tensor, "B G S W"] | None,
        keep_state: bool,
        **options: Any,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G S W"] | None]:
        """The sum of what both say, and both states; arguments are those of every rule."""
        K, V = self.shape.key_width, self.shape.value_width
        known, weighed = (None, None) if state is None else (state[:, :, :K, :V], state[:, :, K:])
        options["keep_state"] = keep_state
        o, known = self.delta(x, q, k, v, state=known, **options)
        mean, weighed = self.average(x, self.query_map(q), self.key_map(k), v, state=weighed, **options)
        o = o + mean * self.share.to(mean.dtype)[:, None]
        return o, torch.cat((pad(known, (0, 1)), weighed), 2) if keep_state else None


RULES: dict[str, type[Rule]] = {
    "decay": DecayRule,
    "add": AddRule,
    "gated": GatedRule,
    "average": AverageRule,
    "delta": DeltaRule,
    "gated_delta": GatedDeltaRule,
    "delta_and_average": DeltaAndAverageRule,
}


def make_rule(name: str, shape: RuleShape) -> Rule:
    """The rule of that name.

    Raises:
        FastWeightsError: if there is none; it names those that there are.
    """
    check_name("rule", name, RULES)
    return RULES[name](shape)
