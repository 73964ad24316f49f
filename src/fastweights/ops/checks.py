"""What the doors of `ops` accept, and one-line errors for everything else.

Only shapes, dtypes and devices are looked at, never values: a check that reads a tensor would
stall a GPU and break torch.compile.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 2**19
"""Numbers of a state: with as many, that decay as a whole, gradients take a third of the time by plain products, and so
do a few tokens (docs/log.md)."""


def check_inputs(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What any rule with a state (N, G, K, V) takes; raise an error that names the first argument that does not fit.

    Raises:
        TypeError: one is no tensor, or of a dtype that the rules do not take.
        ValueError: shapes or devices do not fit together.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_real(name, x)
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {_shape(x)}; it must be (batch, time, heads, dim): add the missing dimension"
            )
    _check_heads(q, k, v)
    _check_cu_seqlens(cu_seqlens, q)
    _check_state(initial_state, q, k, v, cu_seqlens)


def check_gate(name: str, gate: Tensor | None, x: Tensor, x_name: str) -> None:
    """A gate of one number per token, or one for each channel of x (B, T, G, D), which has been checked.

    Raises:
        TypeError: it is no tensor of floating-point numbers.
        ValueError: its shape or device does not fit that of x.
    """
    if gate is None:
        return
    _check_real(name, gate, x.device)
    B, T, G, D = x.shape
    # Two comparisons: `in` does not see that two symbolic sizes of torch.compile are equal.
    if gate.ndim != 4 or gate.shape[:3] != x.shape[:3] or (gate.shape[3] != 1 and gate.shape[3] != D):
        raise ValueError(
            f"{name} has shape {_shape(gate)}; it must be {(B, T, G, D)} like {x_name}, "
            f"or {(B, T, G, 1)} for one decay per head"
        )


def check_per_head(name: str, x: Tensor, k: Tensor) -> None:
    """One number per token and key/value head of k (B, T, G, K), which has been checked.

    Raises:
        TypeError: it is no tensor of floating-point numbers.
        ValueError: its shape or device does not fit that of k.
    """
    _check_real(name, x, k.device)
    if x.ndim != 4 or x.shape[:3] != k.shape[:3] or x.shape[3] != 1:
        raise ValueError(
            f"{name} has shape {_shape(x)}; it must be {(*k.shape[:3], 1)}: one number per token and key/value head"
        )


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients of what is made of these may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def are_scalar(*gates: Tensor | None) -> bool:
    """Whether each of them that is there is one number per head."""
    return all(gate is None or gate.shape[-1] == 1 for gate in gates)


def compute_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the state and of all sums: float64 if any of q, k, v is, else float32."""
    return torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32


def sequence_bounds(cu_seqlens: Tensor, T: int) -> list[tuple[int, int]]:
    """(start, end) of every packed sequence; reads the tensor's values, so each backend calls it itself."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T or any(start > end for start, end in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens is {_brief(ends)}; it must start with 0, never fall, and end with T = {T}: "
            "pass the cumulative lengths of the packed sequences"
        )
    return list(pairwise(ends))


def _check_real(name: str, x: object, device: torch.device | None = None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} is {_dtype(x)}; it must be floating point: convert it with {name}.float()")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}, but q is on {device}; move them to one device")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        _check_real(name, x, q.device)
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} has (batch, time) = {_shape(x, 2)}, but q has {_shape(q, 2)}; "
                "they must be equal: the rule reads and writes once per token"
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has key width {k.shape[3]}, but q has {q.shape[3]}; they must be equal: project both to one width"
        )
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, but k has {k.shape[2]}; keys and values come in pairs")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which is not a multiple of the {k.shape[2]} key/value heads; "
            "grouped-query heads share a key/value head evenly"
        )


def _check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be a 1-D tensor of int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {_dtype(cu_seqlens)} of shape {_shape(cu_seqlens)}; "
            "it must be int32 or int64 of shape (N + 1,), N >= 1: [0, n1, n1 + n2, ...]"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"q has batch {q.shape[0]} together with cu_seqlens; packed sequences lie in one row: "
            "reshape q, k, v and the gates to (1, total length, heads, dim)"
        )


def _check_state(state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if state is None:
        return
    _check_real("initial_state", state, q.device)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (N, k.shape[2], k.shape[3], v.shape[3])
    if tuple(state.shape) != expected:
        what = "batch" if cu_seqlens is None else "number of packed sequences"
        raise ValueError(
            f"initial_state has shape {_shape(state)}; it must be {expected}: ({what}, key/value heads, K, V)"
        )
    dtype = compute_dtype(q, k, v)
    if state.dtype != dtype:
        raise TypeError(
            f"initial_state is {_dtype(state)}; the state of {_dtype(v)} inputs is {str(dtype)[6:]}: "
            f"keep it in {str(dtype)[6:]} between calls"
        )


def _shape(x: Tensor, n: int | None = None) -> tuple[int, ...]:
    return tuple(x.shape[:n])


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
