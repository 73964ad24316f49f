"""Compiling, announcing it, and sharing work out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastweights.ops.numba import runtime


def test_importing_the_ops_imports_no_numba():
    script = "import sys, fastweights.ops; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_numba_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.core", None)
    with pytest.raises(ImportError, match="backend='cpu' needs numba, which is not installed: pip install numba"):
        runtime.load_kernels.__wrapped__("decay_rule")


def test_compiling_is_announced_once(capsys):
    from numba import njit

    with runtime.announced():
        njit("int64(int64)")(lambda x: x + 1)
        njit("int64(int64)")(lambda x: x + 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fastweights: compiling CPU kernels (kept on disk for the next time) ..."
    assert lines[1].startswith("fastweights: done in ")
    assert len(lines) == 2


def test_kernels_from_the_disk_are_not_announced(capsys):
    runtime.load_kernels.__wrapped__("decay_rule")
    assert capsys.readouterr().err == ""


@pytest.fixture(params=["torch's threads", "our own"])
def pool(request, monkeypatch):
    monkeypatch.setattr(runtime.torch, "get_num_threads", lambda: 2)  # the size of torch's team
    if request.param == "our own":
        monkeypatch.setattr(runtime, "_openmp", lambda: None)
    elif runtime._openmp() is None:
        pytest.skip("torch does not bring GNU's OpenMP here")


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("units", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_unit_is_done_once(units, threads):
    done, lock = [], threading.Lock()

    def work(first, end):
        with lock:
            done.extend(range(first, end))

    runtime.share_out(work, units, threads)
    assert sorted(done) == list(range(units))


@pytest.mark.usefixtures("pool")
def test_several_threads_work_at_once():
    meeting = threading.Barrier(2, timeout=60)
    runtime.share_out(lambda first, end: meeting.wait(), 2, 2)


@pytest.mark.usefixtures("pool")
def test_an_error_in_another_thread_is_raised():
    def work(first, end):
        if first >= 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runtime.share_out(work, 2, 2)


def test_work_that_an_interrupt_kept_from_starting_is_not_taken_for_done():
    class Interrupted:
        def GOMP_parallel(self, *args):
            pass

    with pytest.raises(KeyboardInterrupt):
        runtime._run_team(Interrupted(), lambda: None)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_that_imports_us_first_has_threads_of_its_own():
    script = """
import os, torch
torch.set_num_threads(2)
torch.randn(4_000_000).exp()  # OpenMP's threads start, and stay behind in the fork
child = os.fork()
if not child:
    from fastweights.ops.numba import runtime
    done = []
    runtime.share_out(lambda first, end: done.extend(range(first, end)), 8, 2)
    os._exit(0 if sorted(done) == list(range(8)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_small_problems_take_one_thread(monkeypatch):
    monkeypatch.setattr(runtime.torch, "get_num_threads", lambda: 8)
    assert runtime.thread_count(12 * 64 * 64) == 1
    assert runtime.thread_count(10**9) == 8


def test_the_disk_cache_watches_every_file_of_the_kernels():
    kernels = runtime.load_kernels("decay_rule")
    for kernel in (kernels.cpu_forward.forward, kernels.cpu_backward.backward):
        (version,) = [cell.cell_contents for cell in kernel.py_func.__closure__]
        assert version == runtime.sources_version(Path(kernels.__file__).parent)


def test_a_version_of_sources_changes_with_the_rules_folder_and_with_that_of_all_kernels(tmp_path, monkeypatch):
    shared, rule = tmp_path / "numba", tmp_path / "rule"
    monkeypatch.setattr(runtime, "__file__", str(shared / "runtime.py"))
    versions = set()
    for folder in (shared, rule):
        folder.mkdir()
        for text in ("a = 1", "a = 2"):
            (folder / "x.py").write_text(text)
            versions.add(runtime.sources_version(rule))
    assert len(versions) == 4


_KERNELS = """
from numba import int64, njit


@njit(int64(int64), cache=True)
def kernel(n):
    return n + 1
"""


@pytest.fixture
def nowhere_to_write(tmp_path, monkeypatch) -> Path:
    """A rule whose folder, like the home folder, takes no files."""
    import numba

    folder = tmp_path / "ops" / "tiny"
    folder.mkdir(parents=True)
    (folder / "cpu_kernels.py").write_text(_KERNELS)
    for name in ("__pycache__", "home"):
        place = folder / name
        place.write_text("no folder")
    monkeypatch.setattr("fastweights.ops.__path__", [str(tmp_path / "ops")])
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder / "home"))
    yield folder
    sys.modules.pop("fastweights.ops.tiny.cpu_kernels", None)
    runtime.load_kernels.cache_clear()


def test_kernels_compile_where_nothing_can_be_written(nowhere_to_write, capsys):
    kernels = runtime.load_kernels("tiny")
    assert kernels.kernel(1) == 2
    assert kernels.kernel.stats.cache_path.startswith(runtime._private_folder().name)
    assert "set NUMBA_CACHE_DIR" in capsys.readouterr().err


def test_a_folder_that_the_user_names_is_used(nowhere_to_write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "named"))
    assert runtime.load_kernels("tiny").kernel.stats.cache_path.startswith(str(tmp_path / "named"))
    assert "NUMBA_CACHE_DIR" not in capsys.readouterr().err
