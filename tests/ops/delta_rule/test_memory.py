"""Training keeps no (T, K, V) tensor: measured in a process of its own, from outside."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import re, sys, torch
from pathlib import Path
from fastweights.ops import delta_rule

def train(T):
    q, k, v = (torch.randn(1, T, 4, 128) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k / 12, v, torch.full((1, T, 4, 1), 0.5), torch.full((1, T, 4, 1), -0.1))]
    delta_rule(*leaves, backend=sys.argv[1])[0].sum().backward()

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # MiB

torch.set_num_threads(1)
train(256)
before = peak()
train(2048)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_peak_memory(backend):
    T, H, K, V = 2048, 4, 128, 128
    states = T * H * K * V * 4 / 2**20  # 512 MiB
    rows = T * H * K * 4 / 2**20  # 4 MiB for each of q, k, v, o, errors, and their gradients
    done = subprocess.run([sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, check=True)
    grown = float(done.stdout)
    assert 8 * rows < grown < 40 * rows < states / 3
