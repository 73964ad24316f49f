"""Random inputs for the delta rule, and what its definition makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from fastweights.ops import delta_rule
from tests.ops import problems

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")

run = partial(problems.run, rule=delta_rule)


@dataclass(frozen=True)
class Problem:
    """What to ask of a backend."""

    T: int
    K: int
    V: int
    B: int = 1
    H: int = 2
    G: int = 2
    decay: bool = True
    strongest: float = 0.3
    """Log decays lie between 0 and minus this; a few are exactly 0."""
    initial_state: bool = True
    inclusive: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    scale: float = 0.7
    seed: int = 0


def inputs(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """Tensors by argument name; rounded to `dtype`, the initial state to float32 at least.

    Keys are of about length 1, and beta is from 0 to 1, some of it exactly either.
    """
    p, generator = problem, torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform() -> torch.Tensor:
        return torch.rand(p.B, p.T, p.G, 1, generator=generator, dtype=torch.float64)

    N = p.B if p.cu_seqlens is None else len(p.cu_seqlens) - 1
    u = uniform()
    tensors = {
        "q": normal(p.B, p.T, p.H, p.K),
        "k": F.normalize(normal(p.B, p.T, p.G, p.K), dim=-1) * (0.7 + 0.5 * uniform()),
        "v": normal(p.B, p.T, p.G, p.V),
        "beta": (1.4 * uniform() - 0.2).clamp(0.0, 1.0),
        "log_decay": torch.where(u < 0.1, 0.0, -p.strongest * u**4) if p.decay else None,
        "initial_state": normal(N, p.G, p.K, p.V) if p.initial_state else None,
    }
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        name: x if x is None else x.to(state_dtype if name == "initial_state" else dtype) for name, x in tensors.items()
    }


@cache
def truth(problem: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The reference's results in float64, on inputs rounded to `dtype`."""
    rounded = {name: x if x is None else x.double() for name, x in inputs(problem, dtype).items()}
    return run(rounded, "reference", **problems.options(problem))
