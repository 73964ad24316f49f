"""The vector type, against NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tolerances

numba = pytest.importorskip("numba")

from fastweights.ops.numba import vectors  # noqa: E402

LANES = vectors.LANES


@numba.njit
def _exp(out, x, n):
    for i in range(0, n, LANES):
        vectors.store(vectors.pointer(out), i, vectors.exp(vectors.load(vectors.pointer(x), i)))


@numba.njit
def _sums(out, x):
    p = vectors.pointer(x)
    rows = vectors.totals(
        vectors.load(p, 0),
        vectors.load(p, LANES),
        vectors.load(p, 2 * LANES),
        vectors.load(p, 3 * LANES),
        vectors.load(p, 4 * LANES),
        vectors.load(p, 5 * LANES),
        vectors.load(p, 6 * LANES),
        vectors.load(p, 7 * LANES),
    )
    vectors.store(vectors.pointer(out), 0, rows)
    return vectors.total(vectors.load(p, 0))


@numba.njit
def _copy_first(out, x, n):
    vectors.store_first(vectors.pointer(out), 0, vectors.load_first(vectors.pointer(x), 0, n), n)


def _exp_of(x):
    out = np.empty_like(x)
    _exp(out.ctypes.data, x.ctypes.data, x.size)
    return out


def test_exp_of_decays():
    x = -np.concatenate([np.linspace(0, 86, 4000), np.logspace(-9, 0, 4000)]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(_exp_of(x) / expected - 1).max() < tolerances.FLOAT32_EXP


def test_exp_of_special_values():
    x = np.array([0.0, -0.0, -np.inf, np.nan, -87.5, -1e30, -100.0, -5e-324] * 2, dtype=np.float32)
    np.testing.assert_array_equal(_exp_of(x), np.array([1, 1, 0, np.nan, 0, 0, 0, 1] * 2, dtype=np.float32))


def test_exp_of_growth():
    """A gate above 1 is not checked; it must not become one that wipes a state out."""
    x = np.linspace(0, 88.3, 4000).astype(np.float32)
    assert np.abs(_exp_of(x) / np.exp(x.astype(np.float64)) - 1).max() < 1e-5
    x = np.array([88.5, 89.0, 100.0, 177.0, 1e4, 1e30, 3e38, np.inf] * 2, dtype=np.float32)
    assert (_exp_of(x) == np.inf).all()


def test_sums():
    x = np.arange(8 * LANES, dtype=np.float32)
    out = np.empty(LANES, dtype=np.float32)
    first = _sums(out.ctypes.data, x.ctypes.data)
    np.testing.assert_array_equal(out[:8], x.reshape(8, LANES).sum(1))
    assert first == out[0]


@pytest.mark.parametrize("n", range(LANES))
def test_numbers_beyond_the_first_are_not_touched(n):
    x, out = np.arange(1, LANES + 1, dtype=np.float32), np.full(LANES, -1, dtype=np.float32)
    _copy_first(out.ctypes.data, x.ctypes.data, n)
    np.testing.assert_array_equal(out, np.where(np.arange(LANES) < n, x, -1))


@pytest.mark.skipif(LANES == 8, reason="all other tests have run with eight lanes")
@pytest.mark.timeout(900)  # all kernels are compiled anew
def test_kernels_with_eight_lanes_compute_the_same():
    """As on a machine with AVX2 alone: what they compute, and that they touch nothing beside it."""
    from numba.core.codegen import get_host_cpu_features

    newer = "avx512", "vnni"
    features = ",".join(name for name in get_host_cpu_features().split(",") if not any(part in name for part in newer))
    tests = Path(__file__).parents[1]
    files = [
        tests / rule / name
        for rule in ("decay_rule", "delta_rule")
        for name in (f"test_{rule}.py", "test_cpu_buffers.py")
    ]
    files.append(tests / "few_bits" / "test_few_bits.py")
    files.append(tests / "window" / "test_softmax_backward.py")
    files.append(tests / "next_token" / "test_losses_and_derivatives.py")
    # Without what the other tests share, which compiles kernels of no concern here.
    options = ["-q", "--noconftest", "-k", "not chunked and not compile"]
    command = [sys.executable, "-m", "pytest", __file__, *map(str, files), *options]
    # What is wrong with lanes is wrong at any level of optimization, and the first compiles in half the time.
    environment = {**os.environ, "NUMBA_CPU_FEATURES": features, "NUMBA_OPT": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
