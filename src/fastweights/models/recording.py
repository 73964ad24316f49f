"""What goes into and comes out of each layer's attention while a model reads."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fastweights.models.architectures import attention_modules, has_rotary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from fastweights.models.architectures import Architecture


class AttentionCall(NamedTuple):
    """One layer's part of a forward pass."""

    stream: Tensor
    """(B, T, d): the residual stream before the layer."""
    inputs: Tensor
    """(B, T, d): what its attention was given."""
    output: Tensor
    """(B, T, d): what that made of it."""
    position_embeddings: tuple[Tensor, Tensor] | None
    """Of a rotary embedding; None in a layer that uses none."""


@contextmanager
def record_calls(headless: nn.Module, row: Architecture) -> Iterator[list[AttentionCall]]:
    """Inside `with`, a list that holds each layer's part once it has run.

    Args:
        headless: model with softmax attention, without its head.
        row: its family's.
    """
    streams: list[Tensor] = []
    calls: list[AttentionCall] = []

    def inputs_of(args, kwargs) -> Tensor:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def keep_stream(module, args, kwargs) -> None:
        streams.append(inputs_of(args, kwargs))

    def keep_call(module, args, kwargs, output) -> None:
        embeddings = kwargs.get("position_embeddings") if has_rotary(module) else None
        calls.append(AttentionCall(streams[-1], inputs_of(args, kwargs), output[0], embeddings))

    layers = headless.get_submodule(row.layers)
    hooks = [layer.register_forward_pre_hook(keep_stream, with_kwargs=True) for layer in layers]  # type: ignore[union-attr]
    hooks += [module.register_forward_hook(keep_call, with_kwargs=True) for module in attention_modules(headless, row)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
