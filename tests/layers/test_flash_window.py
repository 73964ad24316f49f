"""The window without gradients gives what the window with them gives, and zeros where there is nothing to see."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from fastweights.layers import flash_window as flash_window_module
from fastweights.layers import window as window_module
from fastweights.layers.flash_window import flash_window, is_for_flash
from fastweights.layers.window import Sinks, WindowTokens, window_attention, windowed
from tests import tolerances
from tests.ops.problems import error

CASES = list(itertools.product((2, 33, 200), (1, 2, 8, 100, 300), (0, 4), (0, 3, 500)))


def problem(T: int, window: int, sinks: int, before: int, *, rows: int = 2, dtype=torch.float32, G: int = 2):
    torch.manual_seed(0)
    L = T + min(before, window - 1)
    q, k, v = (torch.randn(rows, n, heads, 16, dtype=dtype) for n, heads in ((T, 6), (L, G), (L, G)))
    index = torch.arange(before, before + T)[None].expand(rows, -1).clone()
    first = None
    if sinks:
        sink_k, sink_v = torch.randn(2, rows, 1, sinks, G, 16, dtype=dtype)
        first = Sinks(torch.randn(rows, T, 6, 16, dtype=dtype), sink_k, sink_v)
    return (q, k, v), {"window": window, "scale": 0.3, "index": index, "sinks": first}


@torch.no_grad()
def both(monkeypatch, tensors, settings) -> tuple[torch.Tensor, torch.Tensor]:
    assert is_for_flash(*tensors, settings["sinks"])
    flash = window_attention(*tensors, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(window_module, "is_for_flash", lambda *_: False)
        return flash, window_attention(*tensors, **settings)


@pytest.mark.parametrize(("T", "window", "sinks", "before"), CASES)
def test_flash_is_the_window(monkeypatch, T, window, sinks, before):
    tensors, settings = problem(T, window, sinks, before)
    flash, truth = both(monkeypatch, tensors, settings)
    assert error(flash, truth) <= tolerances.FLOAT32


@pytest.mark.parametrize(("T", "before", "keys"), [(16, 0, 64), (16, 20, 96), (100, 0, 192), (16, 5000, 1056)])
def test_a_short_text_is_not_padded_to_its_window(monkeypatch, T, before, keys):
    """A chat's first line sees itself alone, and a line of a long one no more keys than there are."""
    tensors, settings = problem(T, 1024, 4, before)
    seen = []

    def spy(q, k, *arguments):
        seen.append(k.shape[2])
        return attend(q, k, *arguments)

    attend = flash_window_module._flash
    monkeypatch.setattr(flash_window_module, "_flash", spy)
    flash, truth = both(monkeypatch, tensors, settings)
    assert error(flash, truth) <= tolerances.FLOAT32
    assert max(seen) <= keys


def test_rows_at_different_places_and_padding(monkeypatch):
    tensors, settings = problem(90, 40, 4, 30)
    settings["index"][1] -= 30
    settings["index"][1, :7] = -1
    flash, truth = both(monkeypatch, tensors, settings)
    assert error(flash, truth) <= tolerances.FLOAT32
    assert flash[1, :7].eq(0).all()


def test_channels_may_lie_apart_in_memory(monkeypatch):
    """Of a text that needs no padding, which is a copy, and heads that share no keys."""
    tensors, settings = problem(32, 8, 4, 0, G=6)
    apart = [x.mT.contiguous().mT for x in tensors]
    assert all(x.stride(3) != 1 for x in apart)
    flash, truth = both(monkeypatch, apart, settings)
    assert error(flash, truth) <= tolerances.FLOAT32


def test_bfloat16(monkeypatch):
    tensors, settings = problem(90, 40, 4, 500, dtype=torch.bfloat16)
    flash, truth = both(monkeypatch, tensors, settings)
    assert flash.dtype == torch.bfloat16
    assert error(flash.float(), truth.float()) <= 4 * tolerances.BFLOAT16


def test_what_it_is_not_for():
    (q, k, v), settings = problem(20, 8, 4, 0)
    sinks = settings["sinks"]
    assert is_for_flash(q, k, v, sinks)
    assert not is_for_flash(q[:, :1], k, v, sinks)
    assert not is_for_flash(q.clone().requires_grad_(), k, v, sinks)
    with torch.no_grad():
        assert is_for_flash(q.clone().requires_grad_(), k, v, sinks)
        with forward_ad.dual_level():
            assert not is_for_flash(forward_ad.make_dual(q, q), k, v, sinks)
    assert not is_for_flash(q.double(), k.double(), v.double(), None)
    assert not is_for_flash(q, k, v[..., :8], None)
    several = Sinks(q, sinks.k.expand(-1, 3, -1, -1, -1), sinks.v.expand(-1, 3, -1, -1, -1))
    assert not is_for_flash(q, k, v, several)
    assert not torch.func.vmap(lambda x: torch.tensor(is_for_flash(x, k, v, sinks)))(q[None]).any()


@torch.no_grad()
def test_it_reads_a_text_from_its_first_token_on(monkeypatch):
    """All blocks see the same sinks, which are among the tokens that are read."""
    (q, k, v), settings = problem(300, 40, 4, 0)
    new, calls = WindowTokens(q, k, v, settings["sinks"].q), []
    arguments = {"window": 40, "scale": 0.3, "sinks": 4}

    def counted(*args, **kwargs):
        calls.append(1)
        return flash_window(*args, **kwargs)

    monkeypatch.setattr(window_module, "flash_window", counted)
    found, _ = windowed(new, None, **arguments)
    assert calls
    monkeypatch.setattr(window_module, "is_for_flash", lambda *_: False)
    truth, _ = windowed(new, None, **arguments)
    assert error(found, truth) <= tolerances.FLOAT32


@torch.no_grad()
def test_a_query_knows_nothing_of_what_comes_after():
    """Bit for bit, and of nothing before its window."""
    (q, k, v), settings = problem(200, 40, 4, 500)
    before = window_attention(q, k, v, **settings)
    k[:, 39 + 100 :], v[:, 39 + 100 :] = 1e3, 1e30
    assert window_attention(q, k, v, **settings)[:, :100].equal(before[:, :100])
    (q, k, v), settings = problem(200, 40, 4, 500)
    k[:, :39], v[:, :39] = 1e3, 1e30
    assert window_attention(q, k, v, **settings)[:, 39:].equal(before[:, 39:])
