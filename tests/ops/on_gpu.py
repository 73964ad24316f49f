"""What the tests of Triton kernels share: a GPU, or Triton's interpreter, and the compiler, which needs neither.

Where there is none of these, a module that imports this one is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: make test puts it into .venv/triton")
CUDA = torch.cuda.is_available()
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
