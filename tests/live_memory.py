"""Memory that tensors take, counted tensor by tensor: the same on every machine, whatever its allocator keeps."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory: ...`, then `memory.peak`: most bytes that tensors made inside it took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in inputs:  # neither a view of an input nor written in place
                self._sizes[key] = StorageWeakRef(storage), storage.nbytes()
        self._sizes = {key: (ref, size) for key, (ref, size) in self._sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._sizes.values()))
        return out


def _storages(tree) -> dict:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
