import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastweights.layers.window import window_attention


def dense(q, k, v, window, scale, key_mask=None):
    """The definition: softmax attention with a band mask over the whole matrix."""
    past = k.shape[1] - q.shape[1]
    i = torch.arange(q.shape[1])[:, None] + past
    j = torch.arange(k.shape[1])[None, :]
    mask = ((j <= i) & (j > i - window))[None, None].repeat(q.shape[0], 1, 1, 1)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o.masked_fill(~mask.any(-1, keepdim=True), 0).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("past", [0, 3, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_agrees_with_the_band_mask(length, past, kv_heads):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, 4, 6, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, past + length, kv_heads, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, past + length, generator=generator) > 0.4
    for key_mask in (None, mask):
        o = window_attention(q, k, v, window=8, scale=0.3, key_mask=key_mask)
        torch.testing.assert_close(o, dense(q, k, v, 8, 0.3, key_mask), rtol=1e-10, atol=1e-10)


def test_future_changes_nothing_before_it():
    q, k, v = torch.randn(3, 1, 20, 2, 4)
    before = window_attention(q, k, v, window=4, scale=1.0)
    k[:, 13:], v[:, 13:] = 7.0, -3.0
    after = window_attention(q, k, v, window=4, scale=1.0)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


def test_a_query_that_sees_only_padding_gets_zeros_and_finite_gradients():
    q, k, v = torch.randn(3, 1, 9, 2, 4).requires_grad_().unbind(0)
    key_mask = torch.arange(9)[None] >= 6
    o = window_attention(q, k, v, window=4, scale=1.0, key_mask=key_mask)
    assert (o[:, :6] == 0).all()
    assert o[:, 6:].abs().min() > 0
    o.sum().backward()
