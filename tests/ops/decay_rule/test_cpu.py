"""What is particular to the CPU backend: its custom ops under torch's machinery, its threads."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastweights.ops import decay_rule
from fastweights.ops.decay_rule import cpu as module
from tests import tolerances
from tests.ops.problems import NAMES, Problem, assert_close, error, inputs, options, run, same, truth

PROBLEM = Problem(150, 48, 40, 2, 4, 2, seed=11)


@pytest.fixture
def eager():
    return run(inputs(PROBLEM, torch.float32), "cpu", **options(PROBLEM))


@pytest.mark.parametrize(
    "problem", [Problem(70, 20, 100, H=2, G=1, strongest=5.0), Problem(5, 8, 17, H=1, G=1)], ids=str
)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_value_columns_are_shared_out_when_heads_are_few(monkeypatch, problem, threads):
    monkeypatch.setattr(module, "thread_count", lambda work: threads)
    results = run(inputs(problem, torch.float32), "cpu", **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


def test_the_number_of_threads_changes_no_bit_of_the_outputs(monkeypatch, eager):
    monkeypatch.setattr(module, "thread_count", lambda work: 3)
    assert same(run(inputs(PROBLEM, torch.float32), "cpu", **options(PROBLEM)), eager)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize(
    ("gates", "H", "G", "B"), [("scalar scalar", 4, 2, 2), ("scalar none", 1, 1, 1), ("none none", 2, 1, 1)]
)
@pytest.mark.parametrize("T", [1, 2, 3])
@torch.no_grad()
def test_a_few_tokens_of_a_large_state(T, gates, H, G, B, inclusive):
    """Up to two go through products of torch's, and as one after another, with `initial_state` as it was."""
    problem = Problem(T, 1030, 512, B, H, G, *gates.split(), strongest=3.0, inclusive=inclusive)
    tensors, given = inputs(problem, torch.float32), options(problem)
    before = tensors["initial_state"].clone()
    o, state = decay_rule(**tensors, **given, backend="cpu")
    expected = decay_rule(
        **{name: x if x is None else x.double() for name, x in tensors.items()}, **given, backend="reference"
    )
    for found, true in zip((o, state), expected, strict=True):
        assert error(found, true) <= tolerances.FLOAT32
    assert tensors["initial_state"].equal(before)
    first, state_of_first = decay_rule(**at(tensors, 0), **given, backend="cpu")
    assert error(first, expected[0][:, :1]) <= tolerances.FLOAT32
    if T == 2:
        rest = at(tensors, 1) | {"initial_state": state_of_first}
        second, state_of_second = decay_rule(**rest, **given, backend="cpu")
        assert o.equal(torch.cat((first, second), 1))
        assert state.equal(state_of_second)


@torch.no_grad()
def test_a_few_tokens_of_a_large_state_under_autocast_and_after_a_fork(monkeypatch):
    tensors = inputs(Problem(1, 1024, 512, 1, 1, 1, "scalar", "none"), torch.float32)
    o, state = decay_rule(**tensors, output_final_state=True, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        again = decay_rule(**tensors, output_final_state=True, backend="cpu")
    assert again[0].equal(o)
    assert again[1].equal(state)
    monkeypatch.setattr(module, "is_fork", lambda: True)
    monkeypatch.setattr(module, "_take_steps", None)  # whose threads are not there
    assert error(decay_rule(**tensors, backend="cpu")[0], o) <= tolerances.FLOAT32


def at(tensors: dict, t: int) -> dict:
    return {name: x if x is None or name == "initial_state" else x[:, t : t + 1] for name, x in tensors.items()}


@torch.no_grad()
def test_of_a_large_state_a_token_may_forget_all_or_write_nothing():
    tensors = inputs(Problem(2, 1024, 512, 1, 1, 1, "scalar", "none"), torch.float32)
    tensors["k"][:, 1], tensors["v"][:, 1], tensors["key_log_decay"][:, 1] = 0.0, 0.0, 0.0
    _, both = decay_rule(**tensors, output_final_state=True, backend="cpu")
    _, one = decay_rule(**at(tensors, 0), output_final_state=True, backend="cpu")
    assert both.equal(one)
    _, none = decay_rule(**at(tensors, 1), output_final_state=True, backend="cpu")
    assert none.equal(tensors["initial_state"])
    tensors["key_log_decay"][:, 0], tensors["initial_state"][:, :, 3] = -torch.inf, torch.nan
    o, state = decay_rule(**tensors, output_final_state=True, backend="cpu")
    assert o.isfinite().all()
    assert state[0, 0].equal(torch.outer(tensors["k"][0, 0, 0], tensors["v"][0, 0, 0]))


def test_saves_only_inputs_and_checkpoints():
    T, H, K, V = 1024, 2, 32, 32
    tensors = {name: x.requires_grad_() for name, x in inputs(Problem(T, K, V), torch.float32).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        decay_rule(**tensors, backend="cpu")
    assert sum(saved) == T * H * (3 * K + 2 * V) + T // 128 * H * K * V


def test_torch_compile(eager):
    compiled = torch.compile(decay_rule, fullgraph=True, backend="aot_eager")
    tensors = {name: x.requires_grad_() for name, x in inputs(PROBLEM, torch.float32).items()}
    o, state = compiled(**tensors, **options(PROBLEM))
    assert torch.equal(o, eager["o"])
    assert torch.equal(state, eager["final_state"])
    expected = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    sum(x.sum() for x in decay_rule(**expected, **options(PROBLEM), backend="cpu")).backward()
    (o.sum() + state.sum()).backward()
    assert all(torch.equal(tensors[name].grad, expected[name].grad) for name in NAMES)


def test_torch_compile_of_other_widths_and_gates():
    torch.compiler.reset()
    compiled = torch.compile(decay_rule, fullgraph=True, backend="aot_eager")
    # From the second call on, a width that has changed is a symbol, and that of a new gate is not.
    for problem in (Problem(20, 8, 8, value_gate="none"), Problem(20, 16, 12)):
        tensors = inputs(problem, torch.float32)
        expected = decay_rule(**tensors, backend="cpu")[0]
        assert torch.equal(compiled(**tensors, backend="cpu")[0], expected)


def test_torch_compile_of_packed_sequences():
    problem = Problem(40, 8, 8, cu_seqlens=(0, 13, 40))
    tensors = inputs(problem, torch.float32)
    compiled = torch.compile(decay_rule, fullgraph=True, backend="aot_eager")
    expected = decay_rule(**tensors, **options(problem), backend="cpu")
    torch.testing.assert_close(compiled(**tensors, **options(problem)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "none"), ("none", "none")], ids="-".join)
def test_custom_op_conforms_to_torch(gates):
    tensors = inputs(Problem(70, 8, 8, 1, 2, 1, *gates), torch.float32)
    args = [x if x is None else x.requires_grad_() for x in tensors.values()]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(module._forward_op, (*args, None, 0.5, True, True), test_utils=tests)


def test_autocast_does_not_touch_it(eager):
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run(inputs(PROBLEM, torch.float32), "cpu", **options(PROBLEM)), eager)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        leaves = [x.requires_grad_() for x in inputs(PROBLEM, torch.float32).values()]
        wrap(lambda *a: decay_rule(*a[:5], initial_state=a[5], backend="cpu")[0], *leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_several_python_threads_at_once(eager):
    tensors = inputs(PROBLEM, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(run, tensors, "cpu", **options(PROBLEM)) for _ in range(12)]
        assert all(same(job.result(), eager) for job in jobs)


def _child(queue, tensors, expected):
    # Small enough for torch's own threads, which do not survive a fork, to stay out of it.
    queue.put(all((decay_rule(**tensors, backend="cpu")[0][0, t] == expected[0, t]).all().item() for t in (0, 511)))


def test_after_a_fork(monkeypatch):
    monkeypatch.setattr(module, "thread_count", lambda work: 2)
    tensors = inputs(Problem(512, 64, 64), torch.float32)
    expected, _ = decay_rule(**tensors, backend="cpu")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, tensors, expected))
    child.start()
    try:
        assert queue.get(timeout=60)
    finally:
        child.kill()
        child.join()


def test_no_second_derivatives():
    q = torch.randn(1, 3, 1, 8, requires_grad=True)
    o, _ = decay_rule(q, q, q, backend="cpu")
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)
