"""What a Fast Weight Layer costs: beside the static model it sits on, beside a step per token, beside chunk states.

    python -m benchmarks.fast_weight_layer

*naive*: the definition, a gradient by autograd and a step on a copy of the weights for each token. *all chunk states*:
the form of the official code, which materialises the weights at the start of every chunk at once; the peer for memory.
*static*: a byte-level GPT-2 of 12 layers; *large vocabulary*: the same with 32,000 tokens, where the second unembedding
of the slow pass costs most, also with a slow pass over 4,096 of them. Every form must agree with ours before anything
is reported.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, relu
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import time_side_by_side, write_csv
from fastweights.environment import environment
from fastweights.evaluation.comparison import without_layer
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.layers import FastWeightLayer
from fastweights.layers import fast_weight_layer as module
from fastweights.models import add_fast_weight_layer
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.training.next_token import next_token_loss

CHUNK = 64
FEW = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fast_weight_layer.csv"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        *models(arguments.tokens, arguments.width, arguments.repeats),
        *forms(arguments.tokens, arguments.width, arguments.repeats),
    ]
    _print(rows)
    write_csv(arguments.output, rows, environment())
    console.print(f"written to {arguments.output}")


def models(tokens: int, width: int, repeats: int) -> list[dict]:
    """The static model and the same with a layer, forward alone and with the backward pass of training both."""
    rows = []
    for vocabulary in (257, 32000):
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=tokens,
            n_embd=width,
            n_layer=12,
            n_head=width // 64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = add_fast_weight_layer(GPT2LMHeadModel(config))
        layer = model.fast_weight_layer
        assert layer is not None
        _leave_the_identity(layer)
        ids = torch.randint(vocabulary, (1, tokens))

        def forward(model=model, ids=ids):
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        def both(model=model, ids=ids):
            next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
            model.zero_grad()

        def static(run, model=model):
            def task():
                with without_layer(model):
                    run()

            return task

        def with_few(run, layer=layer):
            def task():
                whole = layer.settings
                layer.settings = replace(whole, slow_vocabulary=FEW)
                run()
                layer.settings = whole

            return task

        for what, run in (("forward", forward), ("forward and backward", both)):
            tasks = {"static": static(run), "with the layer": run}
            if vocabulary > FEW:
                tasks[f"with the layer, slow vocabulary {FEW}"] = with_few(run)
            rows += _measure(f"model, {vocabulary} tokens, {what}", tasks, repeats, unit="static")
    return rows


def forms(tokens: int, width: int, repeats: int) -> list[dict]:
    """The layer alone in three forms."""
    layer = FastWeightLayer(width, FastWeightLayerSettings(decay="none", segment=0))
    _leave_the_identity(layer)
    unembedding = nn.Linear(width, 257, bias=False)
    hidden, labels = torch.randn(1, tokens, width), torch.randint(257, (1, tokens))
    ours, _ = layer(hidden, labels, unembedding)
    for name, other in (("naive", naive), ("all chunk states", all_chunk_states)):
        few = slice(0, min(tokens, 2 * CHUNK))
        got = other(layer, hidden[:, few], labels[:, few], unembedding)
        error = ((got - ours[:, few]).norm() / ours[:, few].norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{name} differs from our layer by {error:.1e}: nothing is reported")

    def backward(run):
        def task():
            leaf = hidden.clone().requires_grad_()
            run(leaf).square().sum().backward()
            layer.zero_grad()

        return task

    def run_ours(h):
        return layer(h, labels, unembedding)[0]

    def run_states(h):
        return all_chunk_states(layer, h, labels, unembedding)

    def quietly(run):
        def task():
            with torch.no_grad():
                run(hidden)

        return task

    rows = _measure(
        "layer, forward",
        {
            "ours": quietly(run_ours),
            "all chunk states": quietly(run_states),
            "naive": lambda: naive(layer, hidden, labels, unembedding),
        },
        repeats,
        unit="ours",
    )
    tasks = {"ours": backward(run_ours), "all chunk states": backward(run_states)}
    return rows + _measure("layer, forward and backward", tasks, repeats, unit="ours")


def naive(layer: FastWeightLayer, hidden: Tensor, labels: Tensor, unembedding: nn.Linear) -> Tensor:
    """One position after the other: run with the stepped copy, then step it by autograd's gradient of the slow pass."""
    slow = [layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias, layer.norm_scale, layer.norm_offset]
    slow = [x.detach().clone().requires_grad_() for x in slow]
    fast = [x.detach().clone() for x in slow]
    steps, scale = layer.step_sizes().detach(), layer.output_scale.detach()

    def run(weights, h):
        r = linear(relu(linear(h, weights[0], weights[1])).square(), weights[2], weights[3])
        return h + scale * layer_norm(r, h.shape, weights[4], weights[5])

    outputs = []
    for h, label in zip(hidden[0].detach(), labels[0], strict=True):
        with torch.no_grad():
            outputs.append(run(fast, h))
        gradients = torch.autograd.grad(cross_entropy(unembedding(run(slow, h))[None], label[None]), slow)
        for x, gradient, step in zip(fast, gradients, steps, strict=True):
            x -= step * gradient
    return torch.stack(outputs)[None]


def all_chunk_states(layer: FastWeightLayer, hidden: Tensor, labels: Tensor, unembedding: nn.Linear) -> Tensor:
    """Our layer with its recurrence in the official code's form: the states of all chunks by one cumulative sum."""

    def rule(q, k, v, *gates, initial_state, output_final_state, inclusive):
        q, k, v = (x[:, :, 0].unflatten(1, (-1, CHUNK)) for x in (q, k, v))  # (B, chunks, CHUNK, .)
        written = k.transpose(-1, -2) @ v
        before = written.cumsum(1) - written + initial_state
        scores = (q @ k.transpose(-1, -2)).tril(-1)
        o = scores @ v + q @ before
        return o.flatten(1, 2)[:, :, None], before[:, -1:] + written[:, -1:]

    original, module.decay_rule = module.decay_rule, rule
    try:
        return layer(hidden, labels, unembedding)[0]
    finally:
        module.decay_rule = original


def _measure(what: str, tasks: dict, repeats: int, unit: str) -> list[dict]:
    peak_bytes = {}
    for name, task in tasks.items():
        task()
        with PeakMemory(torch.device("cpu")) as peak:
            task()
        peak_bytes[name] = peak.bytes
    times = time_side_by_side(tasks, repeats)
    return [
        {
            "what": what,
            "form": name,
            **{f"{p}_ms": round(value, 2) for p, value in times[name].items()},
            "time_ratio": round(times[name]["p50"] / times[unit]["p50"], 3),
            "peak_MB": "" if peak_bytes[name] is None else round(peak_bytes[name] / 1e6, 1),
        }
        for name in tasks
    ]


def _leave_the_identity(layer) -> None:
    with torch.no_grad():
        layer.output_scale.fill_(0.1)


def _print(rows: list[dict]) -> None:
    table = Table("what", "form", title="Fast Weight Layer", title_justify="left")
    for column in ("ms", "ratio", "peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["what"], row["form"], f"{row['p50_ms']:.1f}", f"{row['time_ratio']:.2f}", str(row["peak_MB"]))
    console.print(table)


console = Console()

if __name__ == "__main__":
    main()
