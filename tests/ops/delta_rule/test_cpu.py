"""What is particular to the CPU backend: its custom ops under torch's machinery, its threads."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastweights.ops import delta_rule
from fastweights.ops.delta_rule import cpu as module
from tests import tolerances
from tests.ops.delta_rule.problems import NAMES, Problem, inputs, run, truth
from tests.ops.problems import assert_close, options, same

PROBLEM = Problem(150, 48, 40, 2, 4, 2, seed=11)


@pytest.fixture
def eager():
    return run(inputs(PROBLEM, torch.float32), "cpu", **options(PROBLEM))


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_value_columns_are_shared_out_when_heads_are_few(monkeypatch, threads, inclusive):
    monkeypatch.setattr(module, "thread_count", lambda work: threads)
    problem = Problem(70, 20, 100, H=2, G=1, strongest=5.0, inclusive=inclusive)
    results = run(inputs(problem, torch.float32), "cpu", **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


def test_the_number_of_threads_changes_no_bit_of_the_outputs(monkeypatch, eager):
    monkeypatch.setattr(module, "thread_count", lambda work: 3)
    assert same(run(inputs(PROBLEM, torch.float32), "cpu", **options(PROBLEM)), eager)


def test_saves_only_inputs_errors_and_checkpoints():
    T, H, K, V = 1024, 2, 32, 32
    tensors = {name: x.requires_grad_() for name, x in inputs(Problem(T, K, V), torch.float32).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        delta_rule(**tensors, backend="cpu")
    assert sum(saved) == T * H * (2 * K + 2 * V + 2) + T // 128 * H * K * V


@pytest.mark.parametrize("decay", [True, False])
def test_torch_compile(decay):
    problem = Problem(40, 16, 12, decay=decay, cu_seqlens=(0, 13, 40))
    tensors = {name: x for name, x in inputs(problem, torch.float32).items() if x is not None}
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    results = []
    for rule in (delta_rule, compiled):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        o, state = rule(**dict(zip(tensors, leaves, strict=True)), **options(problem))
        (o.square().sum() + state.sum()).backward()
        results.append([o, state, *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [True, False])
def test_custom_op_conforms_to_torch(decay):
    tensors = inputs(Problem(70, 8, 8, 1, 2, 1, decay), torch.float32)
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
        wrap(lambda *a: delta_rule(*a[:5], initial_state=a[5], backend="cpu")[0], *leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(grads[0]) == len(NAMES)


def test_several_python_threads_at_once(eager):
    tensors = inputs(PROBLEM, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(run, tensors, "cpu", **options(PROBLEM)) for _ in range(12)]
        assert all(same(job.result(), eager) for job in jobs)


def _child(queue, tensors, expected):
    # Small enough for torch's own threads, which do not survive a fork, to stay out of it.
    queue.put(all((delta_rule(**tensors, backend="cpu")[0][0, t] == expected[0, t]).all().item() for t in (0, 511)))


def test_after_a_fork(monkeypatch):
    monkeypatch.setattr(module, "thread_count", lambda work: 2)
    tensors = inputs(Problem(512, 64, 64), torch.float32)
    expected, _ = delta_rule(**tensors, backend="cpu")
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
    o, _ = delta_rule(q, q, q, torch.ones(1, 3, 1, 1), backend="cpu")
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)
