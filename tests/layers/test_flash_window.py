"""The window by flash attention is the window written out: outputs, all gradients, and zeros where nothing is seen."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad

from fastweights.layers import flash_window as flash_window_module
from fastweights.layers import window as window_module
from fastweights.layers.flash_window import flash_window, is_for_flash
from fastweights.layers.window import Sinks, WindowTokens, window_attention, windowed
from fastweights.ops.numba.scratch import guarded
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
    with forward_ad.dual_level():
        assert not is_for_flash(forward_ad.make_dual(q, q), k, v, sinks)
    assert not is_for_flash(q, k, v.bfloat16(), sinks)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_for_flash(q, k, v.bfloat16(), sinks)
    with torch.autocast("cpu", torch.float16):
        assert not is_for_flash(q, k, v, sinks)
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


def gradients(tensors, settings, do: torch.Tensor, *, written_out: bool = False) -> list[torch.Tensor]:
    """The output, and derivatives of all that is seen."""
    sinks = settings["sinks"] or ()
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *sinks)]
    settings = {**settings, "sinks": Sinks(*leaves[3:]) if sinks else None}
    with pytest.MonkeyPatch.context() as patch:
        if written_out:
            patch.setattr(window_module, "is_for_flash", lambda *_: False)
        else:
            assert is_for_flash(*leaves[:3], settings["sinks"])
        o = window_attention(*leaves[:3], **settings)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def doubled(tensors, settings) -> tuple[list[torch.Tensor], dict]:
    sinks = settings["sinks"] and Sinks(*(x.double() for x in settings["sinks"]))
    return [x.double() for x in tensors], {**settings, "sinks": sinks}


@pytest.mark.parametrize(("T", "window", "sinks", "before"), CASES)
def test_all_gradients(T, window, sinks, before):
    tensors, settings = problem(T, window, sinks, before)
    do = torch.randn_like(tensors[0])
    truth = gradients(*doubled(tensors, settings), do, written_out=True)
    for found, true in zip(gradients(tensors, settings, do), truth, strict=True):
        if true.abs().max() < 1e-12:  # a softmax of one key has no derivative
            assert found.abs().max() <= tolerances.FLOAT32
        else:
            assert error(found, true) <= tolerances.FLOAT32


def test_gradients_of_rows_at_different_places_and_padding():
    """What padding holds changes nothing, and gets nothing."""
    tensors, settings = problem(90, 40, 4, 30)
    settings["index"][1] -= 30
    settings["index"][1, :7] = -1
    do = torch.randn_like(tensors[0])
    truth = gradients(*doubled(tensors, settings), do, written_out=True)
    found = gradients(tensors, settings, do)
    for of_flash, true in zip(found, truth, strict=True):
        assert error(of_flash, true) <= tolerances.FLOAT32
    assert found[1][1, :7].eq(0).all()


def test_gradients_do_not_hang_on_how_many_blocks_are_made_at_once(monkeypatch):
    tensors, settings = problem(300, 40, 4, 30)
    do = torch.randn_like(tensors[0])
    together = gradients(tensors, settings, do)
    monkeypatch.setattr(flash_window_module, "_AT_ONCE", 1)
    for one, all_ in zip(gradients(tensors, settings, do), together, strict=True):
        assert error(one, all_) <= tolerances.FLOAT32


@pytest.mark.parametrize("sinks", [0, 4])
def test_gradients_in_bfloat16_and_under_autocast(sinks):
    tensors, settings = problem(200, 100, sinks, 30, dtype=torch.bfloat16)
    do = torch.randn_like(tensors[0].float())
    truth = gradients(*doubled(tensors, settings), do, written_out=True)
    for found, true in zip(gradients(tensors, settings, do), truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found.float(), true) <= 4 * tolerances.BFLOAT16
    floats = [x.float() for x in tensors]
    settings = {**settings, "sinks": (sinks and Sinks(*(x.float() for x in settings["sinks"]))) or None}
    with torch.autocast("cpu", torch.bfloat16):
        o, *of_floats = gradients(floats, settings, do)
    assert o.dtype == torch.bfloat16
    for found, true in zip(of_floats, truth[1:], strict=True):
        assert found.dtype == torch.float32
        assert error(found, true) <= 4 * tolerances.BFLOAT16


def test_gradients_have_gradients():
    """As those of the window written out: of the sum of their squares."""
    tensors, settings = problem(50, 20, 4, 10)

    def of_squares(tensors, settings) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*tensors, *settings["sinks"])]
        o = window_attention(*leaves[:3], **{**settings, "sinks": Sinks(*leaves[3:])})
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    for found, true in zip(of_squares(tensors, settings), of_squares(*doubled(tensors, settings)), strict=True):
        assert error(found, true) <= tolerances.FLOAT32


def test_gradients_under_checkpointing():
    tensors, settings = problem(200, 40, 0, 30)
    do = torch.randn_like(tensors[0])
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = torch.utils.checkpoint.checkpoint(lambda *xs: window_attention(*xs, **settings), *leaves, use_reentrant=False)
    for found, true in zip(torch.autograd.grad(o, leaves, do), gradients(tensors, settings, do)[1:], strict=True):
        assert found.equal(true)


def test_a_gradient_knows_nothing_of_keys_that_are_not_seen():
    """Bit for bit: what lies outside every window is never touched, even if it is of another size."""
    tensors, settings = problem(200, 40, 4, 500)
    do = torch.randn_like(tensors[0])
    do[:, 100:] = 0
    before = gradients(tensors, settings, do)[1:]
    q, k, v = (x.clone() for x in tensors)
    k[:, 39 + 100 :], v[:, 39 + 100 :] = 1e3, 1e30
    after = gradients((q, k, v), settings, do)[1:]
    for found, true in zip(after, before, strict=True):
        assert found.equal(true)


def test_the_kernel_stays_in_its_scratch():
    tensors, settings = problem(90, 41, 4, 30)
    with guarded():
        found = gradients(tensors, settings, torch.randn_like(tensors[0]))
    assert all(x.isfinite().all() for x in found)
