"""What learning while reading gives: static, control, dynamic evaluation, Fast Weight Layers with and without decay.

    python -m benchmarks.adaptation --model embedded --text stdlib
    python -m benchmarks.adaptation --model runs/enwik8-base --text corpora/enwik8

For each seed a block is meta-trained on the frozen model: without fast updates (control: what the extra parameters
alone give), with them (fwl), with decay, and with gradients taken at the weights of each segment's start. All read the
same first tokens of the test split, three ways: in independent blocks, each document as a stream, and as one stream
across documents, many times the training length. Dynamic evaluation is tuned on the validation split, for blocks (it
goes on from block to block) and for documents. One JSON line per result goes to OUTPUT as soon as it is known; a run
that was cut off goes on where it stopped.

Training is that of `fastweights train --stage meta`, with its settings, but the hidden states of the frozen model are
computed once for all runs, which makes it about twice as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from benchmarks.common import environment
from fastweights.data import DataConfig, load_documents, tokenize
from fastweights.evaluation.comparison import ComparisonConfig, compare
from fastweights.evaluation.perplexity import EvaluationConfig, evaluate
from fastweights.layers import FastWeightLayerSettings
from fastweights.models import FastWeightsForCausalLM, add_fast_weight_layer, load_model
from fastweights.models.loading import load_tokenizer, resolve_model
from fastweights.training import MetaConfig, RunConfig
from fastweights.training.meta import RunSampler

# What a layer is made of, and the blocks in a row that its fast weights go on through in training.
VARIANTS = {
    "control": (FastWeightLayerSettings(updates=False), 1),
    "fwl": (FastWeightLayerSettings(decay="none", segment=0), 1),  # the paper
    "fwl, scalar decay": (FastWeightLayerSettings(decay="scalar", segment=0), 1),
    "fwl, scalar decay, blocks in a row": (FastWeightLayerSettings(decay="scalar", segment=0), MetaConfig().blocks),
    "fwl, segments": (FastWeightLayerSettings(decay="none"), MetaConfig().blocks),
    "fwl, scalar decay, segments": (FastWeightLayerSettings(decay="scalar"), MetaConfig().blocks),
    "fwl, channel decay, segments": (FastWeightLayerSettings(decay="channel"), MetaConfig().blocks),
    "fwl, input decay, segments": (FastWeightLayerSettings(decay="input"), MetaConfig().blocks),
    **{
        f"fwl, slow vocabulary {n}": (FastWeightLayerSettings(slow_vocabulary=n), MetaConfig().blocks)
        for n in (100, 4096)  # of bytes, and of subwords
    },
}
DEFAULT_VARIANTS = ("control", "fwl", "fwl, scalar decay", "fwl, input decay, segments")  # the last is the default
WAYS = {
    "blocks": EvaluationConfig(context="block"),
    "documents": EvaluationConfig(context="stream"),
    "one stream": EvaluationConfig(context="stream", carry_documents=True),
}
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--output", type=Path, default=None, help="default: runs/adaptation/TEXT-MODEL")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT_VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65536, help="of the test split")
    parser.add_argument("--tune-tokens", type=int, default=12288, help="of the validation split")
    parser.add_argument("--dynamic", nargs="*", default=["sgd", "rms"])
    arguments = parser.parse_args()
    name = f"{Path(arguments.text).name}-{Path(arguments.model).name}"
    output = arguments.output or Path("runs/adaptation") / name
    results = Results(output / "results.jsonl", arguments)

    texts = {
        split: tokenize(load_documents(DataConfig(text=arguments.text, split=split)), load_tokenizer(arguments.model))
        for split in ("validation", "test")
    }
    base = load_model(resolve_model(arguments.model))
    for way, evaluation in WAYS.items():
        if results.misses("static", way, 0):
            results.add("static", way, 0, _evaluate(base, texts["test"], evaluation, arguments))
    if arguments.dynamic:
        _dynamic(base, texts, arguments, results)
    jobs = [(seed, variant) for seed in arguments.seeds for variant in arguments.variants]
    jobs = [(seed, name) for seed, name in jobs if any(results.misses(name, way, seed) for way in WAYS)]
    states = _hidden_states(base, arguments) if jobs else (torch.empty(0), torch.empty(0))
    for seed, variant in jobs:
        console.print(f"{variant}, seed {seed}")
        start = time.perf_counter()
        model = _trained(base, *VARIANTS[variant], states, seed, arguments)
        seconds = time.perf_counter() - start
        for way, evaluation in WAYS.items():
            bits = _evaluate(model, texts["test"], evaluation, arguments)
            results.add(variant, way, seed, bits, training_seconds=round(seconds), **_learned(model))
        folder = output / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
        model.save_pretrained(folder)
        load_tokenizer(arguments.model).save_pretrained(folder)
    results.print(f"{arguments.text}, {arguments.model}: bits per token, {arguments.tokens:,} tokens of the test split")


@torch.no_grad()
def _hidden_states(base: PreTrainedModel, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """What the unembedding is given in runs of blocks from all over the training text, and each next token."""
    documents = load_documents(DataConfig(text=arguments.text, split="train"))
    tokens = tokenize(documents, load_tokenizer(arguments.model)).tokens
    T, run = arguments.block_size, MetaConfig().blocks
    count = min(arguments.steps, (len(tokens) - 1) // T) // run
    starts = torch.arange(count) * ((len(tokens) - 1 - run * T) // max(1, count - 1))
    starts = (starts[:, None] + T * torch.arange(run)).flatten()
    blocks = tokens[starts[:, None] + torch.arange(T + 1)]
    body = (base.model if isinstance(base, FastWeightsForCausalLM) else base).base_model
    hidden = [body(input_ids=block[None, :-1]).last_hidden_state for block in blocks]  # type: ignore[operator]
    return torch.cat(hidden), blocks[:, 1:]


def _trained(
    base: PreTrainedModel,
    settings: FastWeightLayerSettings,
    run: int,
    states: tuple[Tensor, Tensor],
    seed: int,
    arguments: argparse.Namespace,
) -> FastWeightsForCausalLM:
    config = MetaConfig(steps=arguments.steps)
    torch.manual_seed(seed)
    model = add_fast_weight_layer(base, settings).requires_grad_(False)
    layer, unembedding = model.fast_weight_layer, model.get_output_embeddings()
    assert layer is not None and isinstance(unembedding, torch.nn.Linear)  # noqa: PT018
    layer.requires_grad_(True)
    small = set(layer.small_parameter_names())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in layer.named_parameters() if (name in small) == is_small], "lr": rate}
            for is_small, rate in ((False, config.learning_rate), (True, config.new_learning_rate))
        ],
        betas=(0.9, RunConfig().adam_beta2),
        weight_decay=config.weight_decay,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup, config.steps)
    sampler, state = RunSampler(len(states[0]), run, 1, seed), None
    for step, i in enumerate(_endless(sampler, config.steps)):
        hidden, labels = (x[i : i + 1] for x in states)
        output, state = layer(hidden, labels, unembedding, state if i % run else None)
        state = None if state is None else state.detach()
        loss = cross_entropy(unembedding(output)[0].float(), labels[0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), RunConfig().max_grad_norm)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            console.print(f"  step {step + 1} of {config.steps}: {loss.item() / math.log(2):.3f} bits")
    return model.eval()


def _endless(sampler: RunSampler, n: int) -> Iterator[int]:
    """The first n of its indices, epoch after epoch."""
    for i in range(n):
        if i % len(sampler) == 0:
            sampler.set_epoch(i // len(sampler))
            order = list(sampler)
        yield order[i % len(sampler)]


def _learned(model: FastWeightsForCausalLM) -> dict[str, object]:
    layer = model.fast_weight_layer
    assert layer is not None
    if not layer.settings.updates:
        return {}
    learned: dict[str, object] = {"step_sizes": layer.step_sizes().tolist()}
    if layer.settings.decay == "scalar":
        learned["kept_a_token"] = layer.decay_logit.sigmoid().tolist()
    return learned


def _evaluate(model, text, evaluation, arguments) -> float:
    settings = replace(evaluation, max_tokens=arguments.tokens, batch_size=1)
    return evaluate(model, text, block_size=arguments.block_size, config=settings).loss / math.log(2)


def _dynamic(base, texts, arguments, results: Results) -> None:
    for way, context in (("blocks", "block"), ("documents", "stream")):
        for rule in arguments.dynamic:
            if not results.misses(rule, way, 0):
                continue
            training = None
            if rule == "rms":
                documents = load_documents(DataConfig(text=arguments.text, split="train"))
                training = tokenize(documents[: max(1, len(documents) // 8)], load_tokenizer(arguments.model))
            rows = compare(
                base,
                texts["test"],
                ComparisonConfig(
                    methods=(rule,),
                    contexts=(context,),  # type: ignore[arg-type]
                    tune_tokens=arguments.tune_tokens,
                ),
                block_size=arguments.block_size,
                evaluation=EvaluationConfig(max_tokens=arguments.tokens),
                validation=texts["validation"],
                training=training,
                say=console.print,
            )
            settings = rows[-1].settings
            assert settings is not None
            results.add(
                rule,
                way,
                0,
                rows[-1].evaluation.loss / math.log(2),
                time_ratio=rows[-1].time_ratio,
                memory_ratio=rows[-1].memory_ratio,
                step_size=settings.step_size,
                decay=settings.decay,
            )


class Results:
    """Results on disk, one JSON line each, with what they were made with."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        self.path = path
        names = ("model", "text", "steps", "block_size", "tokens", "tune_tokens")
        self.settings = {name: getattr(arguments, name) for name in names}
        self.about = {**self.settings, **environment()}
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        # Those of other settings stay in the file and are left out here.
        self.rows = [row for row in rows if all(row.get(name) == value for name, value in self.settings.items())]

    def misses(self, method: str, way: str, seed: int) -> bool:
        """Whether there is no such result yet."""
        return not any((row["method"], row["way"], row["seed"]) == (method, way, seed) for row in self.rows)

    def add(self, method: str, way: str, seed: int, bits: float, **more) -> None:
        """Keep a result, at once."""
        row = {"method": method, "way": way, "seed": seed, "bits_per_token": bits, **more, **self.about}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        console.print(f"  {method}, {way}, seed {seed}: {bits:.4f}")

    def print(self, title: str) -> None:
        """Mean and, over several seeds, standard deviation."""
        table = Table("method", title=title, title_justify="left")
        for way in WAYS:
            table.add_column(way, justify="right")
        for method in dict.fromkeys(row["method"] for row in self.rows):
            cells = []
            for way in WAYS:
                bits = [row["bits_per_token"] for row in self.rows if (row["method"], row["way"]) == (method, way)]
                spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
                cells.append(f"{statistics.mean(bits):.3f}{spread}" if bits else "-")
            table.add_row(method, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
