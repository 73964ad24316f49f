"""What benchmarks of the rules share: their inputs, the check before any timing, the passes that are timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from fastweights.ops import decay_rule, delta_rule

_INPUTS = {decay_rule: ("key_log_decay", "value_log_decay"), delta_rule: ("beta", "log_decay")}


def inputs(
    B: int, T: int, H: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v, key_log_decay, value_log_decay; gates between e^-0.2 and 1."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator, device=device) for _ in range(3))
    f, z = (-0.2 * torch.rand(B, T, H, D, generator=generator, device=device) for _ in range(2))
    return [x.to(dtype) for x in (q, k / D**0.5, v, f, z)]


def delta_inputs(
    B: int, T: int, H: int, D: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v, beta, log_decay: keys of length 1, beta between 0 and 1, decays between e^-0.2 and 1."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator, device=device) for _ in range(3))
    beta, decay = (torch.rand(B, T, H, 1, generator=generator, device=device) for _ in range(2))
    return [x.to(dtype) for x in (q, normalize(k, dim=-1), v, beta, -0.2 * decay)]


def check(
    backend: str,
    given: Sequence[torch.Tensor | None],
    tolerance: float,
    what: str = "",
    rule: Callable = decay_rule,
) -> None:
    """Ends the program if `fault` finds one."""
    if wrong := fault(backend, given, tolerance, what, rule):
        sys.exit(f"{wrong}; nothing timed")


def fault(
    backend: str,
    given: Sequence[torch.Tensor | None],
    tolerance: float,
    what: str = "",
    rule: Callable = decay_rule,
) -> str | None:
    """Outputs and all gradients against the reference in float64: which is wrong, None if none is.

    Args:
        backend: to check.
        given: what `inputs` or `delta_inputs` gives, with None for a gate that is left out.
        tolerance: largest difference over the largest value.
        what: of which problem this is said, where there are several.
        rule: `decay_rule` or `delta_rule`.
    """
    results = {}
    for name in (backend, "reference"):
        leaves: list[Any] = [
            None if x is None else x.detach().to(x.dtype if name == backend else torch.float64).requires_grad_()
            for x in given
        ]
        outputs: Any = rule(*leaves, output_final_state=True, backend=name)
        projections = [torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x) for x in outputs]
        found = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], projections))
        results[name] = [*outputs, *(None if x is None else next(found) for x in leaves)]
    names = ("o", "state", *(f"d{name}" for name in ("q", "k", "v", *_INPUTS[rule][: len(given) - 3])))
    return _first_wrong(f"{rule.__name__}, {backend!r}{what}", names, results[backend], results["reference"], tolerance)


def fault_of_step(
    backend: str, given: Sequence[torch.Tensor], tolerance: float, what: str = "", rule: Callable = decay_rule
) -> str | None:
    """The same of a decoding step from a state, one token of each text: its output and state, without gradients."""
    *_, H, D = given[0].shape
    state = torch.randn(len(given[0]), H, D, D, device=given[0].device)
    results = rule(*given, initial_state=state, output_final_state=True, backend=backend)
    doubles = (x.double() for x in given)
    truths = rule(*doubles, initial_state=state.double(), output_final_state=True, backend="reference")
    return _first_wrong(f"{rule.__name__}, {backend!r}{what}", ("o", "state"), results, truths, tolerance)


def _first_wrong(
    whose: str,
    names: Sequence[str],
    results: Sequence[torch.Tensor | None],
    truths: Sequence[torch.Tensor | None],
    tolerance: float,
) -> str | None:
    for name, result, truth in zip(names, results, truths, strict=True):
        if result is None or truth is None:
            continue
        error = ((result.double() - truth).abs().max() / truth.abs().max()).item()
        if not error <= tolerance:
            return f"{whose}: relative error {error:.1e} in {name}"
    return None


def forward(run: Callable, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A call of `run` that remembers nothing for gradients."""

    def task() -> None:
        with torch.no_grad():
            run(*tensors)

    return task


def forward_and_backward(run: Callable, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A call of `run` with the gradients of all its inputs; the third, v, has the shape of what comes out."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    do = torch.ones_like(tensors[2])

    def task() -> None:
        torch.autograd.grad(run(*leaves), leaves, do)

    return task
