"""The Triton kernels: on a GPU where there is one, otherwise in Triton's interpreter, on fewer and smaller problems.

PYTHONPATH=.venv/triton TRITON_INTERPRET=1 python -m pytest tests/ops/decay_rule/test_gpu.py
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastweights.ops import decay_rule
from tests import tolerances
from tests.ops.decay_rule import test_borders as borders
from tests.ops.decay_rule import test_decay_rule as common
from tests.ops.on_gpu import CUDA, DEVICE, compiled, compiled_step_equals_eager, of_all_backends, take_there, there
from tests.ops.problems import Problem, assert_close, assert_close_at_random, error, inputs, options, run, truth

SMALL = [
    Problem(1, 16, 16, H=1, G=1, inclusive=False),
    Problem(2, 1, 3, H=1, G=1),
    Problem(37, 16, 20, 1, 2, 1, strongest=20.0),
    Problem(18, 5, 3, 2, 1, 1, "scalar", "vector", inclusive=False),
    Problem(17, 16, 16, 1, 1, 1, "none", "scalar", initial_state=False),
    Problem(33, 16, 16, 1, 1, 1, "vector", "none", 5.0),
    Problem(9, 16, 16, 1, 1, 1, "none", "none", inclusive=False),
    Problem(70, 16, 16, 1, 1, 1, inclusive=False),
    Problem(20, 80, 130, 1, 1, 1, strongest=200.0),
    Problem(24, 16, 16, H=1, G=1, strongest=5.0, inclusive=False, cu_seqlens=(0, 0, 1, 17, 17, 24)),
    Problem(24, 16, 16, H=1, G=1, strongest=5.0, cu_seqlens=(0, 0, 24)),
]
LARGE = [
    *common._covering(),
    *(Problem(37, 16, 20, 1, 4, 2, *gates, 20.0, True, i, seed=1) for gates in common.GATES for i in (True, False)),
    *(Problem(300, K, V, 2, 2, 1, inclusive=i) for K, V in ((256, 256), (577, 256), (1, 300)) for i in (True, False)),
    *(Problem(90, 16, 32, H=4, inclusive=i, cu_seqlens=(0, 0, 1, 64, 64, 90)) for i in (True, False)),
    Problem(5000, 64, 64, 2, 6, 3, strongest=20.0),
]


def run_there(tensors: dict, problem: Problem) -> dict[str, torch.Tensor]:
    return run(there(tensors), "gpu", **there(options(problem)))


def outputs(tensors: dict, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    o, state = decay_rule(**there(tensors), **there(kwargs), output_final_state=True, backend="gpu")
    return o.cpu(), state.cpu()


@pytest.mark.parametrize("problem", SMALL + (LARGE if CUDA else []), ids=str)
def test_agrees_with_the_reference(problem):
    assert_close(run_there(inputs(problem, torch.float32), problem), truth(problem, torch.float32), tolerances.FLOAT32)


@settings(max_examples=25 if CUDA else 2, deadline=None)
@given(data=st.data())
def test_agrees_with_the_reference_on_random_problems(data):
    problem = common.drawn(data.draw, 90 if CUDA else 9)
    results = run_there(inputs(problem, torch.float32), problem)
    assert_close_at_random(results, truth(problem, torch.float32), tolerances.FLOAT32)


@pytest.mark.parametrize(
    ("module", "test", "arguments"),
    of_all_backends(
        (common, borders),
        "test_agrees_with_the_reference_for_any_gates",
        "test_a_gate_of_zero_forgets_all_and_makes_no_nan",
        "test_nan_reaches_the_outputs_after_it",
        "test_strided_views_of_one_projection",
    ),
)
def test_as_on_a_cpu(module, test, arguments, monkeypatch):
    take_there(monkeypatch, module, decay_rule, run)
    test(**arguments, backend="gpu")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, tolerances.BFLOAT16), (torch.float16, tolerances.FLOAT16)], ids=str
)
def test_low_precision_inputs_have_a_float32_state(dtype, tolerance):
    problem = Problem(20, 16, 16, 1, 2, 1, seed=2)
    results = run_there(inputs(problem, dtype), problem)
    assert results["o"].dtype == results["dq"].dtype == results["dkey_log_decay"].dtype == dtype
    assert results["final_state"].dtype == results["dinitial_state"].dtype == torch.float32
    assert_close(results, truth(problem, dtype), tolerance)


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_gate_of_zero_forgets_all_and_makes_no_nan(inclusive):
    problem = Problem(36, 16, 16, 1, 1, 1, inclusive=inclusive, seed=7)
    tensors = inputs(problem, torch.float32)
    tensors["key_log_decay"][:, [0, 5, 16, 35]] = -torch.inf
    tensors["value_log_decay"][:, [7, 15, 20]] = -torch.inf
    results = run_there(tensors, problem)
    expected = run({n: x.double() for n, x in tensors.items()}, "reference", **options(problem))
    assert all(x.isfinite().all() for x in results.values())
    assert_close(results, expected, tolerances.FLOAT32)


@pytest.mark.parametrize("inclusive", [True, False])
def test_splitting_a_sequence_anywhere_changes_nothing(inclusive):
    problem = Problem(75, 16, 16, 1, 1, 1, inclusive=inclusive, seed=3)
    tensors, kwargs = inputs(problem, torch.float32), {"scale": problem.scale, "inclusive": inclusive}
    whole, final_state = outputs(tensors, **kwargs)
    state = tensors.pop("initial_state")
    for cut in (1, 17, 64):
        o_first, carried = outputs({n: x[:, :cut] for n, x in tensors.items()}, **kwargs, initial_state=state)
        o_second, after = outputs({n: x[:, cut:] for n, x in tensors.items()}, **kwargs, initial_state=carried)
        assert error(torch.cat([o_first, o_second], dim=1), whole) <= tolerances.FLOAT32
        assert error(after, final_state) <= tolerances.FLOAT32


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_future_token_changes_no_bit_of_an_earlier_output(inclusive):
    tensors, kwargs = inputs(Problem(70, 16, 16, 1, 1, 1, seed=4), torch.float32), {"inclusive": inclusive}
    o, _ = outputs(tensors, **kwargs)
    for t in (8, 31, 69):
        changed = {name: x.clone() for name, x in tensors.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t] = 100 * torch.randn_like(changed[name][:, t])
        for name in ("key_log_decay", "value_log_decay"):
            changed[name][:, t] = -9.0
        after, _ = outputs(changed, **kwargs)
        assert torch.equal(after[:, :t], o[:, :t])
        assert not torch.equal(after[:, t:], o[:, t:])


@pytest.mark.parametrize("T", [1, 70])
def test_masked_tokens_leave_the_state_bit_for_bit(T):
    tensors = inputs(Problem(T, 16, 20, B=2, seed=5), torch.float32)
    for name in ("k", "v", "key_log_decay", "value_log_decay"):
        tensors[name].zero_()
    assert torch.equal(outputs(tensors)[1], tensors["initial_state"])


@pytest.mark.parametrize("name", ["v", "key_log_decay", "value_log_decay"])
def test_nan_reaches_the_outputs_after_it(name):
    tensors = inputs(Problem(20, 16, 16, H=1, G=1), torch.float32)
    tensors[name][:, 12] = torch.nan
    o, state = outputs(tensors)
    assert o[:, 12:].isnan().all()
    assert state.isnan().all()


def test_strided_views_of_one_projection():
    torch.manual_seed(0)
    q, k, v = (x.unflatten(-1, (2, 16)) for x in torch.randn(2, 18, 3 * 2 * 16, device=DEVICE).chunk(3, dim=-1))
    f, z = -torch.rand(2, 2, 18, 16, device=DEVICE).transpose(1, 2), -torch.rand(2, 18, 16, 2, device=DEVICE).mT
    o, _ = decay_rule(q, k, v, f, z, backend="gpu")
    contiguous = [x.contiguous() for x in (q, k, v, f, z)]
    expected, _ = decay_rule(*contiguous, backend="gpu")
    # A compiler takes a stride of 1 for known, and may multiply and add in another order.
    assert error(o, expected) <= tolerances.FLOAT32 if CUDA else torch.equal(o, expected)


def test_inputs_are_left_alone_and_the_state_is_new():
    for T in (0, 1, 5):
        tensors = there(inputs(Problem(T, 16, 16), torch.float32))
        before = {name: x.clone() for name, x in tensors.items()}
        _, state = decay_rule(**tensors, output_final_state=True, backend="gpu")
        state.zero_()
        assert all(torch.equal(tensors[name], x) for name, x in before.items())


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    tensors = there(inputs(Problem(20, 16, 16, H=1, G=1), torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        decay_rule(**{name: x.requires_grad_() for name, x in tensors.items()}, backend="gpu")
    assert set(saved) == {x.data_ptr() for x in tensors.values()}


def test_torch_compile_and_autocast():
    problem = Problem(18, 16, 16, H=1, G=1, cu_seqlens=(0, 7, 18))
    tensors = there(inputs(problem, torch.float32))
    expected = decay_rule(**tensors, **there(options(problem)), backend="gpu")
    compiled = torch.compile(decay_rule, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        results = compiled(**tensors, **there(options(problem)), backend="gpu")
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_torch_compile_of_a_training_step():
    problem = Problem(5, 8, 8, 1, 2, 2, initial_state=False)
    compiled_step_equals_eager(decay_rule, inputs(problem, torch.float32))


def test_custom_ops_conform_to_torch():
    from fastweights.ops.decay_rule import gpu

    tensors = there(inputs(Problem(5, 8, 8, 1, 1, 1, "vector", "scalar"), torch.float32))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    args = (*(x.requires_grad_() for x in tensors.values()), None, 0.5, True)
    torch.library.opcheck(gpu._forward_op, args, test_utils=tests)
    # Heads before tokens, as most attention modules have them: a compiler believes the strides that it is told.
    tensors = there(inputs(Problem(3, 4, 4, 1, 2, 2, "vector", "scalar"), torch.float32))
    o, *given, state = (x if x.ndim != 4 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors.values())
    back = (torch.randn_like(o), torch.randn_like(state), o, *given, state, None, 0.5, True)
    torch.library.opcheck(gpu._backward_op, back, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    tensors, grads = there(inputs(Problem(5, 8, 8, H=1, G=1), torch.float32)), []
    for wrap in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=use_reentrant)):
        leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
        wrap(lambda *a: decay_rule(*a[:5], initial_state=a[5], backend="gpu")[0], *leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_second_derivatives():
    q = torch.randn(1, 3, 1, 8, requires_grad=True, device=DEVICE)
    o, _ = decay_rule(q, q, q, backend="gpu")
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)


def test_what_does_not_fit_is_one_line(monkeypatch):
    tensors = inputs(Problem(3, 8, 8))
    with pytest.raises(TypeError, match="backend='gpu' computes in float32, but q, k or v is float64"):
        decay_rule(**tensors, backend="gpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='gpu' needs tensors on a GPU, but q is on cpu"):
        decay_rule(**inputs(Problem(3, 8, 8), torch.float32), backend="gpu")


def test_all_kernels_compile_for_a_gpu(tmp_path):
    """To machine code of an H100, in seconds."""
    names = ("written", "read_back", "scan", "pairs", "outputs", "gradients", "step")
    constants = dict.fromkeys(("KEY_GATE", "VALUE_GATE", "GATED", "BACK"), True) | dict.fromkeys(("BK", "BV", "BD"), 64)
    constants |= {"SHIFT": 1, "CHUNK": 64, "SUB": 16, "READERS": 4, "PRECISION": "tf32x3"}
    found = compiled("fastweights.ops.decay_rule.gpu_kernels", names, constants, tmp_path)
    assert len(found) == 7
    assert all(kernel.seconds < 60 for kernel in found)
