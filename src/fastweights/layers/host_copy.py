"""HostCopy: a tensor's numbers for the host, on their way while an accelerator goes on with other work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class HostCopy:
    """A tensor's numbers, which a GPU sends at once and which are waited for where they are read.

    What was asked of the GPU between the two goes on meanwhile, where `Tensor.tolist` would wait for all of it.

    Args:
        x: where it is on a CPU, it is read as it is.
    """

    def __init__(self, x: Tensor) -> None:
        self._copy, self._sent = x, None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._copy.copy_(x, non_blocking=True)
            self._sent = torch.cuda.current_stream(x.device).record_event()

    def tolist(self) -> list[Any]:
        """As the tensor's own."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._copy.tolist()
