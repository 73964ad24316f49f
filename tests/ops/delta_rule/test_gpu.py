"""The delta rule's Triton kernels: on a GPU where there is one, otherwise in Triton's interpreter, on smaller problems.

PYTHONPATH=.venv/triton TRITON_INTERPRET=1 python -m pytest tests/ops/delta_rule/test_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.ops import delta_rule
from tests import tolerances
from tests.ops.delta_rule import test_borders as borders
from tests.ops.delta_rule import test_delta_rule as common
from tests.ops.delta_rule.problems import Problem, inputs, run, truth
from tests.ops.on_gpu import CUDA, DEVICE, compiled, compiled_step_equals_eager, of_all_backends, take_there, there
from tests.ops.problems import assert_close, assert_close_at_random, error, options

SMALL = [
    Problem(1, 16, 16, H=1, G=1, inclusive=False),
    Problem(2, 1, 3, H=1, G=1),
    Problem(37, 16, 20, 1, 2, 1, strongest=20.0),
    Problem(70, 5, 3, 2, 4, 2, inclusive=False),
    Problem(129, 16, 48, 2, 1, 1, decay=False),
    Problem(70, 140, 40, H=1, G=1, strongest=200.0, initial_state=False),
    Problem(24, 16, 16, H=1, G=1, strongest=5.0, inclusive=False, cu_seqlens=(0, 0, 1, 17, 17, 24)),
    Problem(140, 16, 16, H=2, G=1, cu_seqlens=(0, 65, 140)),
]
LARGE = [
    *common._covering(),
    *(Problem(300, K, V, 2, 2, 1, inclusive=i) for K, V in ((256, 256), (1, 300)) for i in (True, False)),
    *(Problem(90, 16, 32, H=4, inclusive=i, cu_seqlens=(0, 0, 1, 64, 64, 90)) for i in (True, False)),
    Problem(5000, 64, 64, 2, 6, 3, strongest=20.0),
]


def run_there(tensors: dict, problem: Problem) -> dict[str, torch.Tensor]:
    return run(there(tensors), "gpu", **there(options(problem)))


def outputs(tensors: dict, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    o, state = delta_rule(**there(tensors), **there(kwargs), output_final_state=True, backend="gpu")
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


@pytest.mark.parametrize(("module", "test", "arguments"), of_all_backends((common, borders)))
def test_as_on_a_cpu(module, test, arguments, monkeypatch):
    take_there(monkeypatch, module, delta_rule, run)
    test(**arguments, backend="gpu")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, tolerances.BFLOAT16), (torch.float16, tolerances.FLOAT16)], ids=str
)
def test_low_precision_inputs_have_a_float32_state(dtype, tolerance):
    problem = Problem(70, 16, 16, 1, 2, 1, seed=2)
    results = run_there(inputs(problem, dtype), problem)
    assert results["o"].dtype == results["dq"].dtype == results["dlog_decay"].dtype == dtype
    assert results["final_state"].dtype == results["dinitial_state"].dtype == torch.float32
    assert_close(results, truth(problem, dtype), tolerance)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)], ids=str)
def test_a_step_is_what_reading_one_token_more_is(heads, decay, inclusive):
    """A kernel of its own does it, where no gradients are wanted."""
    problem = Problem(1, 20, 36, 2, *heads, decay, inclusive=inclusive, seed=6)
    tensors = inputs(problem, torch.float32)
    o, state = outputs(tensors, scale=problem.scale, inclusive=inclusive)
    expected = truth(problem, torch.float32)
    assert error(o, expected["o"]) <= tolerances.FLOAT32
    assert error(state, expected["final_state"]) <= tolerances.FLOAT32


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_decay_of_zero_forgets_all_and_makes_no_nan(inclusive):
    problem = Problem(70, 16, 16, 1, 1, 1, inclusive=inclusive, seed=7)
    tensors = inputs(problem, torch.float32)
    tensors["log_decay"][:, [0, 5, 16, 64, 69]] = -torch.inf
    results = run_there(tensors, problem)
    expected = run({n: x.double() for n, x in tensors.items()}, "reference", **options(problem))
    assert all(x.isfinite().all() for x in results.values())
    assert_close(results, expected, tolerances.FLOAT32)


@pytest.mark.parametrize("inclusive", [True, False])
def test_splitting_a_sequence_anywhere_changes_nothing(inclusive):
    problem = Problem(140, 16, 16, 1, 1, 1, inclusive=inclusive, seed=3)
    tensors, kwargs = inputs(problem, torch.float32), {"scale": problem.scale, "inclusive": inclusive}
    whole, final_state = outputs(tensors, **kwargs)
    state = tensors.pop("initial_state")
    for cut in (1, 64, 90):
        o_first, carried = outputs({n: x[:, :cut] for n, x in tensors.items()}, **kwargs, initial_state=state)
        o_second, after = outputs({n: x[:, cut:] for n, x in tensors.items()}, **kwargs, initial_state=carried)
        assert error(torch.cat([o_first, o_second], dim=1), whole) <= tolerances.FLOAT32
        assert error(after, final_state) <= tolerances.FLOAT32


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_future_token_changes_no_bit_of_an_earlier_output(inclusive):
    tensors, kwargs = inputs(Problem(70, 16, 16, 1, 1, 1, seed=4), torch.float32), {"inclusive": inclusive}
    o, _ = outputs(tensors, **kwargs)
    for t in (8, 63, 69):
        changed = {name: x.clone() for name, x in tensors.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t] = 100 * torch.randn_like(changed[name][:, t])
        changed["beta"][:, t], changed["log_decay"][:, t] = 0.7, -9.0
        after, _ = outputs(changed, **kwargs)
        assert torch.equal(after[:, :t], o[:, :t])
        assert not torch.equal(after[:, t:], o[:, t:])


@pytest.mark.parametrize("T", [1, 70])
def test_masked_tokens_leave_the_state_bit_for_bit(T):
    tensors = inputs(Problem(T, 16, 20, B=2, seed=5), torch.float32)
    for name in ("k", "v", "log_decay"):
        tensors[name].zero_()
    assert torch.equal(outputs(tensors)[1], tensors["initial_state"])


def test_inputs_are_left_alone_and_the_state_is_new():
    for T in (0, 1, 5):
        tensors = there(inputs(Problem(T, 16, 16), torch.float32))
        before = {name: x.clone() for name, x in tensors.items()}
        _, state = delta_rule(**tensors, output_final_state=True, backend="gpu")
        state.zero_()
        assert all(torch.equal(tensors[name], x) for name, x in before.items())


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    tensors = there(inputs(Problem(20, 16, 16, H=1, G=1), torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        delta_rule(**{name: x.requires_grad_() for name, x in tensors.items()}, backend="gpu")
    assert set(saved) <= {x.data_ptr() for x in tensors.values()}


@pytest.mark.parametrize("cu_seqlens", [None, (0, 7, 18)], ids=str)
def test_torch_compile_and_autocast(cu_seqlens):
    tensors = there(inputs(Problem(18, 16, 16, H=1, G=1, cu_seqlens=cu_seqlens), torch.float32))
    kwargs = there(options(Problem(18, 16, 16, cu_seqlens=cu_seqlens)))
    expected = delta_rule(**tensors, **kwargs, backend="gpu")
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        results = compiled(**tensors, **kwargs, backend="gpu")
    torch.testing.assert_close(results, expected)


def test_torch_compile_of_a_training_step():
    problem = Problem(5, 8, 8, 1, 2, 2, initial_state=False)
    compiled_step_equals_eager(delta_rule, inputs(problem, torch.float32))


def test_custom_ops_conform_to_torch():
    from fastweights.ops.delta_rule import gpu

    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    tensors = there(inputs(Problem(1, 8, 8, 1, 1, 1), torch.float32))
    torch.library.opcheck(gpu._step_op, (*tensors.values(), 0.5, True), test_utils=tests[:2])
    shapes = ((1, 2, 3, 16, 8), (1, 2, 3, 16, 4), (1, 2, 3, 16, 4), (1, 2, 3, 1, 1), (1, 2, 4, 8))
    given = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    table = [torch.tensor([n], device=DEVICE) for n in (0, 3)]
    torch.library.opcheck(gpu._scan_op, (*given, *table), test_utils=tests)


def test_what_does_not_fit_is_one_line(monkeypatch):
    with pytest.raises(TypeError, match="backend='gpu' computes in float32, but q, k or v is float64"):
        delta_rule(**inputs(Problem(3, 8, 8)), backend="gpu")
    with pytest.raises(ValueError, match="keys of up to 256 channels for the delta rule, but k has 257"):
        delta_rule(**there(inputs(Problem(3, 257, 8), torch.float32)), backend="gpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='gpu' needs tensors on a GPU, but q is on cpu"):
        delta_rule(**inputs(Problem(3, 8, 8), torch.float32), backend="gpu")


def test_all_kernels_compile_for_a_gpu(tmp_path):
    """To an H100's machine code, without the instructions that Triton compiles wrongly, into any card's shared memory.

    Wide keys take the compiler half a minute, so only where a GPU is.
    """
    from fastweights.ops.delta_rule.gpu import _LAUNCH

    names, module = ("write", "write_back", "step"), "fastweights.ops.delta_rule.gpu_kernels"
    for L, BK in ((64, 64), (64, 128), (32, 256)) if CUDA else ((64, 64),):
        constants = {"DECAY": True, "INCLUSIVE": True, "READERS": 4, "L": L, "BK": BK, "BV": 32}
        found = compiled(module, names, constants, tmp_path, _LAUNCH)
        assert len(found) == 3
        assert all(kernel.shared <= 99 * 1024 and kernel.seconds < 60 for kernel in found)
        assert not any(kernel.has_wgmma for kernel in found)
