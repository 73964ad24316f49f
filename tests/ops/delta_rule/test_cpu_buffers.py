"""The kernels' buffers: nothing is read before it is written, and nothing is written beyond them."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops.delta_rule import cpu as module
from fastweights.ops.numba import calls, scratch
from fastweights.ops.numba.runtime import load_kernels
from tests.ops.delta_rule.problems import Problem, inputs, run
from tests.ops.problems import options, same

PROBLEMS = [
    Problem(70, 16, 16),
    Problem(70, 17, 33, B=2),
    Problem(200, 33, 17, inclusive=False),
    Problem(9, 1, 1, H=1, G=1),
    Problem(130, 8, 100, H=3, G=1, strongest=20.0),
    Problem(31, 12, 20, decay=False, inclusive=False),
    Problem(129, 24, 40, decay=False, initial_state=False),
    Problem(0, 20, 12),
    Problem(1, 20, 12, inclusive=False),
    Problem(300, 20, 12, H=4, cu_seqlens=(0, 0, 1, 130, 130, 300)),
    Problem(300, 12, 20, cu_seqlens=(0, 127, 128, 257, 300), inclusive=False),
]


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_buffers_of_nan_change_nothing(monkeypatch, decay, inclusive):
    problem = Problem(70, 20, 24, 2, 4, 2, decay, inclusive=inclusive)
    tensors = inputs(problem, torch.float32)
    expected = run(tensors, "cpu", **options(problem))
    filled = []

    def poisoned(shape, dtype=torch.float32):
        filled.append(shape)
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(calls, "empty", poisoned)
    with scratch.guarded():
        assert same(run(tensors, "cpu", **options(problem)), expected)
    assert len(filled) > 8


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nothing_is_written_beyond_a_buffer(monkeypatch, problem, threads):
    monkeypatch.setattr(module, "thread_count", lambda work: threads)
    tensors = inputs(problem, torch.float32)
    expected = run(tensors, "cpu", **options(problem))
    with scratch.guarded():
        assert same(run(tensors, "cpu", **options(problem)), expected)


BUFFERS = [
    (kernel, name)
    for kernel in ("cpu_forward", "cpu_backward")
    for name in getattr(load_kernels("delta_rule"), kernel).Buffers._fields
]


@pytest.mark.parametrize(("kernel", "name"), BUFFERS)
def test_a_buffer_too_small_is_found_out_by_name(monkeypatch, kernel, name):
    problem = Problem(130, 20, 24, H=4, G=2, inclusive=False)  # fills each buffer
    kernel = getattr(load_kernels("delta_rule"), kernel)

    def drifted(*args):
        """The sizes of a kernel whose buffer `name` has grown by a vector, without a word to who takes the memory."""
        sizes = kernel_sizes(*args)
        return sizes._replace(**{name: getattr(sizes, name) - 8})

    kernel_sizes = kernel.buffer_sizes
    monkeypatch.setattr(kernel, "buffer_sizes", drifted)
    with scratch.guarded(), pytest.raises(RuntimeError, match=f"a kernel wrote past the end of its buffer {name!r}"):
        run(inputs(problem, torch.float32), "cpu", **options(problem))
