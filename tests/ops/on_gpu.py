"""What the tests of Triton kernels share: a GPU, or Triton's interpreter, and the compiler, which needs neither.

And the tests of all other backends, made for these kernels.

Where there is none of these, a module that imports this one is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import islice, product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test puts it into .venv/triton")
# With a GPU there, too, the interpreter runs where it is asked for, as `make test` does.
CUDA = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
# The reference goes step by step: threads of several tests at once would wait for each other at every step. No conftest
# says so where these tests run without one.
torch.set_num_threads(1)

_COMPILE = """
import importlib, json, sys, time
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BF16 = {"q", "k", "v", "beta", "o", "do", "x", "y"}
WHOLE = {"starts", "ends", "sequence_starts", "first_chunks", "chunk_counts"}
NUMBERS = {"tokens", "H", "G", "R", "K", "V", "D", "SEQUENCE", "HEAD"}
module, names, constants, options = json.loads(sys.argv[1])
for name in names:
    kernel = getattr(importlib.import_module(module), name)
    signature, known = {}, {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name], known[parameter.name] = "constexpr", constants[parameter.name]
        elif parameter.name.endswith(("_row", "_head", "_column")) or parameter.name in NUMBERS:
            signature[parameter.name] = "i32"
        elif parameter.name == "scale":
            signature[parameter.name] = "fp32"
        else:
            kind = "i64" if parameter.name in WHOLE else "bf16" if parameter.name in BF16 else "fp32"
            signature[parameter.name] = "*" + kind
    start = time.perf_counter()
    made = triton.compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", 90, 32), options=options)
    print(json.dumps([name, time.perf_counter() - start, made.metadata.shared, "wgmma" in made.asm["ptx"]]))
"""


class Compiled(NamedTuple):
    """A kernel as an H100's machine code."""

    name: str
    seconds: float
    shared: int
    """Bytes of shared memory."""
    has_wgmma: bool
    """Whether a product became an instruction that four warps share."""


def there(tensors: dict) -> dict:
    """Tensors, or whatever else, where the kernels run."""
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}


HAVE_THEIR_OWN = (
    "test_agrees_with_the_reference_at_any_length_and_width",
    "test_agrees_with_the_reference_on_packed_sequences",
    "test_low_precision_inputs_have_a_float32_state_and_only_their_own_rounding",
    "test_splitting_a_sequence_anywhere_changes_nothing",
    "test_a_future_token_changes_no_bit_of_an_earlier_output",
    "test_masked_tokens_leave_the_state_bit_for_bit",
    "test_inputs_are_left_alone_and_the_state_is_new",
)
"""Tests of both rules for which those of the kernels have some of their own, on smaller problems."""
SHORT = {"T": 12, "SOME": 8, "LONG": 20}
"""Constants of those modules, and how many tokens they say where the interpreter runs."""
_OF_STEPS = "test_padding_changes_no_bit_of_the_real_tokens"
"""True of what goes token by token alone: chunks of other tokens are other sums."""


def of_all_backends(modules: tuple[ModuleType, ...], *have_their_own: str) -> list:
    """Parameters (module, test, arguments): each test of these modules that takes a backend, with all it is run with.

    In the interpreter one case of each, and none of HAVE_THEIR_OWN, to which may be added.
    """
    found = []
    for module in modules:
        for name, test in vars(module).items():
            marks = {
                mark.args[0]: mark.args[1] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"
            }
            if "backend" in marks and name != _OF_STEPS and (CUDA or name not in (*HAVE_THEIR_OWN, *have_their_own)):
                del marks["backend"]
                cases = _cases(marks) if CUDA else islice(_cases(marks), 1)
                found += [
                    pytest.param(module, test, case, id="-".join((name, *map(str, case.values())))) for case in cases
                ]
    return found


def _cases(marks: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for values in product(*marks.values()):
        case: dict[str, Any] = {}
        for names, value in zip(marks, values, strict=True):
            several = not isinstance(names, str) or "," in names
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            case |= dict(zip(names, value if several else (value,), strict=True))
        yield case


def take_there(monkeypatch: pytest.MonkeyPatch, module: ModuleType, rule: Callable, run: Callable) -> None:
    """Let tests that know of no GPU run the kernels: tensors of `rule` go there, and what it returns comes back.

    Args:
        monkeypatch: what undoes it.
        module: of the tests.
        rule: as the module has it, under its own name.
        run: as the module has it, if it does: it takes the rule as `rule`.
    """

    @wraps(rule)
    def there_and_back(*tensors: Any, **arguments: Any) -> tuple:
        if arguments.get("backend") == "gpu":
            tensors, arguments = tuple(there(dict(enumerate(tensors))).values()), there(arguments)
        return tuple(None if x is None else x.cpu() for x in rule(*tensors, **arguments))

    new = {rule.__name__: there_and_back, "run": partial(run, rule=there_and_back)} | ({} if CUDA else SHORT)
    for name in new.keys() & vars(module).keys():
        monkeypatch.setattr(module, name, new[name])


def compiled_step_equals_eager(rule: Callable, tensors: dict) -> None:
    """Of a rule without an initial state: the gradients of a compiled program are those of the rule."""
    given, grads = {name: x for name, x in there(tensors).items() if x is not None}, []
    for run in (rule, torch.compile(rule, fullgraph=True, backend="aot_eager")):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
        o, _ = run(**leaves, backend="gpu")
        grads.append(torch.autograd.grad(o.square().sum(), list(leaves.values())))
    torch.testing.assert_close(*grads)


def compiled(
    module: str, names: tuple[str, ...], constants: dict, folder: Path, options: dict | None = None
) -> list[Compiled]:
    """Kernels of a module, by the compiler itself.

    Args:
        module: their module.
        names: of the kernels.
        constants: what they are compiled for, by name.
        folder: for the compiler's files.
        options: of the launch.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", _COMPILE, json.dumps([module, names, constants, options])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [Compiled(*json.loads(line)) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    return found
