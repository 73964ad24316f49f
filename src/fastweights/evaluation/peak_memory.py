"""How much memory a piece of work takes at its peak, above what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import TracebackType

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes`: of the GPU, or of the process on Linux, else None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before: int | None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _reset_peak_of_process()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update()

    def update(self) -> None:
        """Set `bytes` to the peak so far."""
        if self._before is not None:
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else _of_process("VmHWM")
            self.bytes = max(0, peak - self._before)


def _reset_peak_of_process() -> int | None:
    """Memory in use now, after the allocator has given back what it can; None where the system cannot tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5", encoding="utf-8")  # proc(5): sets the peak to the memory in use
        return _of_process("VmRSS")
    except (OSError, AttributeError):
        return None


def _of_process(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1]) * 1024
