"""Errors of the door: one line that says what was given, what is allowed and what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad

from fastweights import ops
from fastweights.ops import decay_rule, delta_rule
from tests.ops.delta_rule.problems import Problem as DeltaProblem
from tests.ops.delta_rule.problems import inputs as delta_inputs
from tests.ops.problems import Problem, inputs

CU = torch.tensor([0, 2, 6])

WRONG = [
    ({"q": torch.zeros(1, 6, 8)}, ValueError, "q has shape (1, 6, 8); it must be (batch, time, heads, dim)"),
    ({"q": torch.zeros(1, 6, 4, 8, dtype=torch.int64)}, TypeError, "q is int64; it must be floating point"),
    ({"k": [1.0]}, TypeError, "k is a list; it must be a torch.Tensor"),
    ({"k": torch.zeros(1, 5, 2, 8)}, ValueError, "k has (batch, time) = (1, 5), but q has (1, 6)"),
    ({"k": torch.zeros(1, 6, 2, 9)}, ValueError, "k has key width 9, but q has 8"),
    ({"v": torch.zeros(1, 6, 3, 4)}, ValueError, "v has 3 heads, but k has 2"),
    ({"q": torch.zeros(1, 6, 3, 8)}, ValueError, "q has 3 heads, which is not a multiple of the 2 key/value heads"),
    (
        {"key_log_decay": torch.zeros(1, 6, 2, 4)},
        ValueError,
        "key_log_decay has shape (1, 6, 2, 4); it must be (1, 6, 2, 8) like k, or (1, 6, 2, 1)",
    ),
    ({"key_log_decay": torch.zeros(1, 6, 4, 1)}, ValueError, "key_log_decay has shape (1, 6, 4, 1); it must be"),
    ({"key_log_decay": torch.zeros(1, 6, 2, 8).bool()}, TypeError, "key_log_decay is bool; it must be floating point"),
    ({"value_log_decay": torch.zeros(1, 6, 2)}, ValueError, "value_log_decay has shape (1, 6, 2); it must be (1, 6"),
    ({"value_log_decay": 0.5}, TypeError, "value_log_decay is a float; it must be a torch.Tensor"),
    (
        {"initial_state": torch.zeros(1, 2, 4, 8)},
        ValueError,
        "initial_state has shape (1, 2, 4, 8); it must be (1, 2, 8, 4): (batch, key/value heads, K, V)",
    ),
    (
        {"cu_seqlens": CU},
        ValueError,
        "initial_state has shape (1, 2, 8, 4); it must be (2, 2, 8, 4): (number of packed sequences",
    ),
    (
        {"initial_state": torch.zeros(1, 2, 8, 4).bfloat16()},
        TypeError,
        "initial_state is bfloat16; the state of float32 inputs is float32",
    ),
    ({"initial_state": torch.zeros(1, 2, 8, 4).double()}, TypeError, "initial_state is float64; the state of float32"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens is a list; it must be a 1-D tensor of int32 or int64"),
    ({"cu_seqlens": CU.float()}, ValueError, "cu_seqlens is float32 of shape (3,); it must be int32 or int64"),
    ({"cu_seqlens": CU[:1]}, ValueError, "cu_seqlens is int64 of shape (1,); it must be"),
    ({"k": torch.zeros(1, 6, 2, 8, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend is 'cuda'; it must be one of 'auto', 'reference', 'chunked', 'cpu', 'gpu'",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_wrong_arguments(change, kind, message):
    arguments = inputs(Problem(6, 8, 4, H=4), torch.float32) | change
    with pytest.raises(kind, match=re.escape(message)) as error:
        decay_rule(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 4, 3, 6]], ids=str)
def test_wrong_bounds_of_packed_sequences(bounds, backend):
    arguments = inputs(Problem(6, 8, 4, initial_state=False), torch.float32)
    with pytest.raises(ValueError, match=re.escape(f"cu_seqlens is {bounds}; it must start with 0, never fall")):
        decay_rule(**arguments, cu_seqlens=torch.tensor(bounds), backend=backend)


def test_packed_sequences_lie_in_one_row():
    arguments = inputs(Problem(6, 8, 4, B=2, initial_state=False), torch.float32)
    with pytest.raises(ValueError, match="q has batch 2 together with cu_seqlens"):
        decay_rule(**arguments, cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize("rule", ["decay", "delta"])
def test_forward_mode_derivatives(rule):
    """Where torch would take a kernel's for 0, without a word."""
    if rule == "decay":
        function, given = decay_rule, inputs(Problem(20, 8, 4), torch.float32)
    else:
        function, given = delta_rule, delta_inputs(DeltaProblem(20, 8, 4), torch.float32)
    tangent = torch.randn_like(given["q"])

    def of(q, **more):
        return function(**given | {"q": q}, **more)[0]

    _, found = torch.func.jvp(of, (given["q"],), (tangent,))
    torch.testing.assert_close(found, of(tangent), rtol=1e-4, atol=1e-5)  # it is linear in the queries
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(of(forward_ad.make_dual(given["q"], tangent)))
        torch.testing.assert_close(dual.tangent, found, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="backend is 'cpu', which has no forward-mode derivatives"):
            of(given["q"], backend="cpu")


def test_cpu_refuses_float64():
    with pytest.raises(TypeError, match="computes in float32, but q, k or v is float64; use backend='chunked'"):
        decay_rule(**inputs(Problem(6, 8, 4)), backend="cpu")


def test_cpu_refuses_other_devices():
    arguments = {name: x.to("meta") for name, x in inputs(Problem(6, 8, 4), torch.float32).items()}
    with pytest.raises(ValueError, match="q is on meta, but backend='cpu' needs CPU tensors"):
        decay_rule(**arguments, backend="cpu")


@pytest.mark.parametrize(
    ("K", "V", "gradients", "vectors", "taken"),
    [
        (64, 8192, True, False, "chunked"),
        (64, 8192, False, False, "cpu"),
        (64, 8192, True, True, "cpu"),
        (64, 4096, True, False, "cpu"),
    ],
)
def test_gradients_of_a_large_state_are_left_to_products(monkeypatch, K, V, gradients, vectors, taken):
    calls = []
    for name in ("chunked", "cpu"):
        rule = ops._DECAY_RULE[name]
        monkeypatch.setitem(ops._DECAY_RULE, name, lambda *a, name=name, rule=rule: calls.append(name) or rule(*a))
    arguments = inputs(Problem(6, K, V, key_gate="vector" if vectors else "scalar", value_gate="none"), torch.float32)
    for x in arguments.values():
        if x is not None:
            x.requires_grad_(gradients)
    decay_rule(**arguments)
    assert calls == [taken]
