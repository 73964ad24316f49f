"""The size of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fastweights.errors import FastWeightsError

CONTEXTS = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's size; the defaults take some eight minutes on two cores."""

    output: Path = Path("demo")
    """Folder for models, pictures and results.json."""
    overwrite: bool = False
    """Start anew in a folder that has a demo, or anything else, in it."""
    window: int = 64
    """Exact window of the hybrid model."""
    tokens: int = 160_000
    """Tokens that each of the two models is trained on."""
    held_out_tokens: int = 16384
    """Tokens of unseen text on which each stage is evaluated."""
    contexts: tuple[int, ...] = CONTEXTS
    """Contexts after which a token is timed, in rising order."""
    meta_steps: int = 200
    """Steps in which the Fast Weight Layer is trained."""
    real: bool = True
    """Go on with SmolLM2-135M, if it is installed or on the hub."""
    real_held_out_tokens: int = 2048
    """Tokens of Python's manual on which it is evaluated."""
    read_tokens: int = 50_000
    """Tokens of Python's manual that it reads at constant memory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if not self.contexts or self.contexts[0] < 1 or any(a >= b for a, b in pairwise(self.contexts)):
            raise FastWeightsError(f"contexts are {list(self.contexts)}; give numbers of tokens in rising order")
        least_of = {"window": 2, "tokens": 1, "held_out_tokens": 12, "meta_steps": 1}
        least_of |= {"real_held_out_tokens": 2, "read_tokens": 1}
        for name, least in least_of.items():
            if (given := getattr(self, name)) < least:
                raise FastWeightsError(f"{name} is {given}; it must be at least {least}")
