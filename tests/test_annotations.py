"""The check of annotations in annotations.py works, so a test run says something about them."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from fastweights.layers.fast_weight_layer import next_token_gradient
from fastweights.layers.window import window_attention
from tests.annotations import check_annotations


def test_wrong_shapes_are_seen():
    x = torch.zeros(1, 5, 2, 4)
    assert window_attention(x, x, x, window=2, scale=1.0).shape == x.shape
    with pytest.raises(TypeCheckError):
        window_attention(x, x, x[:, :4], window=2, scale=1.0)
    with pytest.raises(TypeCheckError):
        next_token_gradient(torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.nn.Linear(4, 9))


def test_all_are_decorated_once():
    assert check_annotations() == 0
