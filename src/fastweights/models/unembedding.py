"""The unembedding as a matrix in memory, which is what a Fast Weight Layer learns from."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.utils import align_module_device
from torch import nn

from fastweights.errors import FastWeightsError
from fastweights.layers.linear import is_differentiated
from fastweights.layers.quantised import FEW, Int8Linear, QuantisedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastweights.layers.next_token_gradient import Unembedding


@contextmanager
def readable(head: nn.Module, positions: int) -> Iterator[Unembedding]:
    """A head, or the embedding that it is tied to, as a linear layer whose weights can be read in this context.

    accelerate keeps offloaded weights elsewhere, and fetches them only where a module is called. One of few bits is
    unpacked for many positions, and stays as it is for a few where its kernels know both directions.

    Args:
        head: nn.Linear, nn.Embedding for one that has the same weights, or one in few bits of ours.
        positions: how many of them have a label.

    Raises:
        FastWeightsError: if its weights are no plain matrix: quantised by others, or with an adapter beside it; or
            if it is exported.
    """
    if torch.compiler.is_exporting():
        raise FastWeightsError(
            "torch.export takes no model with a Fast Weight Layer, which goes through a text segment by segment: "
            "export the model below it"
        )
    if isinstance(head, QuantisedLinear):
        with align_module_device(head):
            if not isinstance(head, Int8Linear) or not head.goes_both_ways:
                # To be unpacked for each token takes too long, where it is not fetched for each anyway.
                yield head.whole(keep=head.weight.is_cpu and not hasattr(head, "_hf_hook"))
            elif positions > FEW or is_differentiated():
                yield head.whole()
            else:
                yield head
        return
    if not isinstance(head, nn.Linear | nn.Embedding) or type(head.weight) not in (torch.Tensor, nn.Parameter):
        raise FastWeightsError(
            f"the unembedding is a {type(head).__module__}.{type(head).__name__} of {_kind(head)}, and a Fast Weight "
            "Layer learns from its plain matrix: leave lm_head out of quantisation and adapters"
        )
    with align_module_device(head):
        if isinstance(head, nn.Linear):
            yield head
        else:
            linear = nn.Linear(head.embedding_dim, head.num_embeddings, bias=False, device="meta")
            linear.weight = head.weight
            yield linear


def _kind(head: nn.Module) -> str:
    weight = getattr(head, "weight", None)
    return type(weight() if callable(weight) else weight).__name__
