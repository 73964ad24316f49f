"""Random inputs for the decay rule, and all that a backend of any rule makes of inputs: outputs, state, gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from fastweights.ops import decay_rule

NAMES = ("q", "k", "v", "key_log_decay", "value_log_decay", "initial_state")


@dataclass(frozen=True)
class Problem:
    """What to ask of a backend; gates are "none", "scalar" or "vector"."""

    T: int
    K: int
    V: int
    B: int = 1
    H: int = 2
    G: int = 2
    key_gate: str = "vector"
    value_gate: str = "vector"
    strongest: float = 0.3
    """Log gates lie between 0 and minus this; a few are exactly 0."""
    initial_state: bool = True
    inclusive: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    scale: float = 0.7
    seed: int = 0


def inputs(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """Tensors by argument name; rounded to `dtype`, the initial state to float32 at least."""
    p, generator = problem, torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(kind: str, width: int) -> torch.Tensor | None:
        if kind == "none":
            return None
        u = torch.rand(p.B, p.T, p.G, width if kind == "vector" else 1, generator=generator, dtype=torch.float64)
        return torch.where(u < 0.1, 0.0, -p.strongest * u**4)

    N = p.B if p.cu_seqlens is None else len(p.cu_seqlens) - 1
    tensors = {
        "q": normal(p.B, p.T, p.H, p.K),
        "k": normal(p.B, p.T, p.G, p.K),
        "v": normal(p.B, p.T, p.G, p.V),
        "key_log_decay": gate(p.key_gate, p.K),
        "value_log_decay": gate(p.value_gate, p.V),
        "initial_state": normal(N, p.G, p.K, p.V) if p.initial_state else None,
    }
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        name: x if x is None else x.to(state_dtype if name == "initial_state" else dtype) for name, x in tensors.items()
    }


def options(problem: Problem) -> dict:
    cu_seqlens = None if problem.cu_seqlens is None else torch.tensor(problem.cu_seqlens)
    return {
        "scale": problem.scale,
        "inclusive": problem.inclusive,
        "cu_seqlens": cu_seqlens,
        "output_final_state": True,
    }


def run(tensors: dict, backend: str, rule: Callable = decay_rule, **options) -> dict[str, torch.Tensor]:
    """o, final_state and, under d<name>, the gradients of a fixed random projection of both."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o, final_state = rule(**leaves, **options, backend=backend)
    return results_of(leaves, o, final_state)


def results_of(leaves: dict, o: torch.Tensor, final_state: torch.Tensor) -> dict[str, torch.Tensor]:
    """o, final_state and, under d<name>, the gradients of a fixed random projection of both."""
    loss = sum((x.cpu().double() * _projection(x, i)).sum() for i, x in enumerate((o, final_state)))
    given = {name: x for name, x in leaves.items() if x is not None}
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    else:  # without tokens and an initial state, nothing depends on anything
        grads = [torch.zeros_like(x) for x in given.values()]
    results = {"o": o.detach(), "final_state": final_state.detach()}
    results |= {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
    return {name: x.cpu() for name, x in results.items()}


@cache
def truth(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The reference's results in float64, on inputs rounded to `dtype`."""
    rounded = {name: x if x is None else x.double() for name, x in inputs(problem, dtype).items()}
    return run(rounded, "reference", **options(problem))


def errors(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest absolute value of what is expected, per tensor."""
    assert results.keys() == expected.keys()
    return {name: error(results[name], expected[name]) for name in expected}


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    # What float32 cannot hold as a normal number (a gate of e^-300 has such gradients) counts as nothing.
    if difference < torch.finfo(torch.float32).tiny:
        return 0.0
    largest = expected.abs().max().item()
    return difference / largest if largest else difference


def assert_close(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    wrong = {name: e for name, e in errors(results, expected).items() if not e <= tolerance}
    assert not wrong, f"relative errors above {tolerance:.0e}: {wrong}"


def assert_close_at_random(
    results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """The same for problems that are drawn: a few numbers may all be sums that cancel.

    Their terms are about 1 in size, and it is these whose rounding they have.
    """
    wrong = {name for name, e in errors(results, expected).items() if not e <= tolerance}
    few = {name for name in wrong if expected[name].numel() < 16}
    cancelled = {name for name in few if (results[name].double() - expected[name]).abs().max() <= tolerance}
    left = wrong - cancelled
    assert_close({name: results[name] for name in left}, {name: expected[name] for name in left}, tolerance)


def same(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether all that is expected has come out, bit for bit."""
    return all(torch.equal(results[name], x) for name, x in expected.items())


@contextmanager
def threads_of_torch(count: int):
    """So many, within a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _projection(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
