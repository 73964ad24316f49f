import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.layers.eight_bits import rounded
from fastweights.layers.rules import TokenMarks
from fastweights.layers.window import WindowTokens, token_index, window_attention, windowed
from fastweights.models.cache import HybridCacheLayer, layer_tensors


def dense(tokens, index, window, sinks, scale, bias=None, eight_bits=False):
    """The definition, for tokens of one row without padding: one softmax with a mask over the whole matrix."""
    q, k, v, sink_q = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in tokens)
    near_k, near_v = (rounded(k), rounded(v)) if eight_bits else (k, v)
    place = torch.arange(len(index))
    distance = place[:, None] - place
    same = (distance >= 0) & (distance <= index[:, None])
    near = same & (distance < window)
    far = same & (distance >= window) & (index < sinks)
    logits = torch.where(far, sink_q @ k.mT, q @ near_k.mT) * scale
    if bias is not None:
        column = torch.where(far, window + index.clamp(max=max(sinks - 1, 0)), distance.clamp(0, window - 1))
        logits = logits + bias[:, column]
    weights = logits.masked_fill(~(near | far), -torch.inf).softmax(-1)
    return (weights.masked_fill(far, 0) @ near_v + weights.masked_fill(~far, 0) @ v).transpose(0, 1)


def leaving(x, index, window, sinks):
    """The definition: of the token that each is the last to see, unless that is a sink."""
    left = torch.zeros_like(x)
    for t in range(len(x)):
        if index[t] - (window - 1) >= sinks:
            left[t] = x[t - (window - 1)]
    return left


def random_tokens(batch, length, kv_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = {"q": (4, 6), "k": (kv_heads, 6), "v": (kv_heads, 5), "sink_q": (4, 6)}
    shapes = [(batch, length, *widths[name]) for name in WindowTokens._fields]
    return WindowTokens(*(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes))


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    pieces=lengths,
    rows=st.integers(1, 3),
    window=st.integers(2, 7),
    sinks=st.integers(0, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    padding=st.sampled_from([0.0, 0.0, 0.3, 0.9]),
    starts=st.sampled_from([0.0, 0.0, 0.2]),
    with_bias=st.booleans(),
    eight_bits=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_pieces_padding_and_documents_agree_with_the_definition(
    pieces, rows, window, sinks, kv_heads, padding, starts, with_bias, eight_bits, seed
):
    """In outputs and in all gradients, and the state is of one size; and without gradients."""
    length, generator = sum(pieces), torch.Generator().manual_seed(seed)
    tokens = random_tokens(rows, length, kv_heads, seed)
    bias = torch.randn(4, window + sinks, generator=generator, dtype=torch.float64) if with_bias else None
    real = torch.rand(rows, length, generator=generator) >= padding
    begins = (torch.rand(rows, length, generator=generator) < starts) & real
    weigh = real[..., None, None] * torch.randn(rows, length, 4, 5, generator=generator, dtype=torch.float64)
    weigh_left = (
        torch.randn(rows, length, kv_heads, 1, generator=generator, dtype=torch.float64) * real[..., None, None]
    )

    cache, found, left = HybridCacheLayer(window, sinks, eight_bits=eight_bits), [], []
    held, again = HybridCacheLayer(window, sinks, eight_bits=eight_bits), []
    for part in torch.arange(length).split(pieces):
        marks = TokenMarks(
            None if real[:, part].all() else real[:, part],
            begins[:, part] if begins[:, part].any() else None,
        )
        new = WindowTokens(*(x[:, part] for x in tokens))
        arguments = {"window": window, "scale": 0.3, "sinks": sinks, "bias": bias, "marks": marks, "leaving": True}
        arguments["eight_bits"] = eight_bits
        o, of_leaving = windowed(new, cache, **arguments)
        with torch.no_grad():
            again.append(windowed(WindowTokens(*(x.detach() for x in new)), held, **arguments)[0])
        assert eight_bits == ("keys_codes" in layer_tensors(held))
        found.append(o)
        left.append([x if of_leaving.any is None else x * of_leaving.any[..., None, None] for x in of_leaving[:2]])
        assert all(x.shape[1] == sinks for name, x in layer_tensors(cache).items() if "sink" in name)
    found = torch.cat(found, 1)
    torch.testing.assert_close(torch.cat(again, 1), found.detach(), rtol=0, atol=1e-12)
    left = [torch.cat(parts, 1) for parts in zip(*left, strict=True)]
    loss = (found * weigh).sum() + sum((x * weigh_left).square().sum() for x in left)
    gradients = torch.autograd.grad(loss, tokens, allow_unused=True)

    loss = 0
    for row in range(rows):
        kept = real[row]
        index = token_index(int(kept.sum()), 0, TokenMarks(None, begins[row, kept][None]))[0]
        truth = dense([x[row, kept] for x in tokens], index, window, sinks, 0.3, bias, eight_bits)
        torch.testing.assert_close(found[row, kept], truth, rtol=0, atol=1e-12)
        assert not found[row, ~kept].any()
        loss = loss + (truth * weigh[row, kept]).sum()
        for x, own in zip(left, (tokens.k, tokens.v), strict=True):
            own = rounded(own) if eight_bits else own
            truth = leaving(own[row, kept], index, window, sinks)
            torch.testing.assert_close(x[row, kept], truth, rtol=0, atol=0)
            loss = loss + (truth * weigh_left[row, kept]).square().sum()
    for gradient, truth in zip(gradients, torch.autograd.grad(loss, tokens, allow_unused=True), strict=True):
        if truth is not None and gradient is not None:
            torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-12)
        else:
            assert all(x is None or not x.any() for x in (gradient, truth))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 40), window=st.integers(2, 9), sinks=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_rows_of_whole_documents_agree_with_the_definition(length, window, sinks, seed):
    """As in training, without a cache."""
    tokens = random_tokens(2, length, 2, seed)
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    for marks in (TokenMarks(), TokenMarks(None, starts)):
        found, _ = windowed(tokens, None, window=window, scale=0.3, sinks=sinks, marks=marks)
        index = token_index(length, 0, marks).expand(2, -1)
        for row in range(2):
            truth = dense([x[row] for x in tokens], index[row], window, sinks, 0.3)
            torch.testing.assert_close(found[row], truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("past", [0, 3, 7])
def test_keys_before_the_queries(length, past):
    tokens = random_tokens(1, past + length, 2)
    o = window_attention(tokens.q[:, past:], tokens.k, tokens.v, window=8, scale=0.3)
    truth = dense([x[0] for x in tokens], torch.arange(past + length), 8, 0, 0.3)[past:]
    torch.testing.assert_close(o[0], truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [0, 2])
def test_future_changes_nothing_before_it(sinks):
    tokens = random_tokens(1, 20, 2)
    before, _ = windowed(tokens, None, window=4, scale=1.0, sinks=sinks)
    changed = WindowTokens(*(torch.where(torch.arange(20)[:, None, None] >= 13, 7.0, x) for x in tokens))
    after, _ = windowed(changed, None, window=4, scale=1.0, sinks=sinks)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_that_is_not_finite_reaches_nothing(side, sinks):
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, {"left": slice(0, 6), "right": slice(14, 20), "between": slice(8, 14)}[side]] = False
    tokens, found = [x.detach() for x in random_tokens(2, 20, 2)], []
    for content in (0.0, torch.nan, torch.inf):
        given = WindowTokens(*(x.masked_fill(~real[:, :, None, None], content) for x in tokens))
        cache = HybridCacheLayer(4, sinks)
        read = {"window": 4, "scale": 1.0, "sinks": sinks}
        o, left = windowed(given, cache, **read, marks=TokenMarks(real), leaving=True)
        after, _ = windowed(WindowTokens(*(x[:, :3] for x in tokens)), cache, **read)
        found.append([o, after, *(x[left.any] for x in left[:2])])
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers_are_summed_in_float32(dtype):
    """But q·k themselves, as in transformers' own eager attention."""
    tokens = WindowTokens(*(x.detach().to(dtype) for x in random_tokens(1, 300, 2)))
    error = {}
    for sinks in (0, 1):
        found, _ = windowed(tokens, None, window=200, scale=0.3, sinks=sinks)
        truth, _ = windowed(WindowTokens(*(x.double() for x in tokens)), None, window=200, scale=0.3, sinks=sinks)
        error[sinks] = (found.double() - truth).norm()
    assert found.dtype == dtype
    assert error[1] < 3 * error[0]
