"""What learning while reading gives: static, control, dynamic evaluation, Fast Weight Layers with and without decay.

    python -m benchmarks.comparison --model embedded --text stdlib
    python -m benchmarks.comparison --model runs/enwik8-base --text corpora/enwik8

For each seed a block is meta-trained on the frozen model: without fast updates (control: what the extra parameters
alone give), with them (fwl), with decay, and with gradients taken at the weights of each segment's start. All read the
same first tokens of the test split, three ways: in independent blocks, each document as a stream, and as one stream
across documents, many times the training length. Dynamic evaluation is tuned on the validation split, for documents and
for one stream. One JSON line per result goes to OUTPUT as soon as it is known, and is not computed again; with
--resume, a training that was cut off goes on from its last checkpoint.

Each row is one `fastweights train --stage meta`, or one `fastweights eval`: docs/reproduction.md has the command lines.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastweights.data import TokenizedText, load_documents, tokenize
from fastweights.environment import environment
from fastweights.evaluation.comparison import compare
from fastweights.evaluation.perplexity import evaluate
from fastweights.models import FastWeightsForCausalLM, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.evaluation import ComparisonConfig, EvaluationConfig, HeldOutConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.text import DataConfig
from fastweights.settings.training import MetaConfig, RunConfig, TrainConfig
from fastweights.training import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    parser.add_argument("--output", type=Path, default=None, help="default: runs/comparison/TEXT-MODEL")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT_VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65536, help="of the test split")
    parser.add_argument("--tune-tokens", type=int, default=12288, help="of the validation split")
    parser.add_argument("--dynamic", nargs="*", choices=["sgd", "rms"], default=["sgd", "rms"])
    parser.add_argument("--resume", action="store_true", help="go on with a training that was cut off")
    arguments = parser.parse_args()
    name = f"{Path(arguments.text).name}-{Path(arguments.model).name}"
    output = arguments.output or Path("runs/comparison") / name
    results = Results(output / "results.jsonl", arguments)

    base = load_model(arguments.model)
    text = _text("test", arguments)
    for way in WAYS:
        if results.misses("static", way, 0):
            results.add("static", way, 0, _evaluate(base, text, way, arguments))
    _dynamic(base, text, arguments, results)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if any(results.misses(variant, way, seed) for way in WAYS):
                console.print(f"{variant}, seed {seed}")
                config = train_config(variant, seed, output, arguments)
                start = time.perf_counter()
                train(config)
                seconds, model = round(time.perf_counter() - start), load_model(config.output)
                for way in WAYS:
                    bits = _evaluate(model, text, way, arguments)
                    results.add(variant, way, seed, bits, seconds=seconds, **_learned(model))
    results.print(f"{arguments.text}, {arguments.model}: bits per token, {arguments.tokens:,} tokens of the test split")


def train_config(variant: str, seed: int, output: Path, arguments: argparse.Namespace) -> TrainConfig:
    """The run that trains one variant."""
    settings, blocks = VARIANTS[variant]
    return TrainConfig(
        model=arguments.model,
        output=output / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}",
        stage="meta",
        resume=arguments.resume,
        overwrite=not arguments.resume,
        held_out="test",
        data=DataConfig(text=arguments.text, block_size=arguments.block_size),
        fast_weight_layer=settings,
        meta=MetaConfig(steps=arguments.steps, blocks=blocks),
        evaluation=HeldOutConfig(max_tokens=arguments.tokens),
        run=RunConfig(seed=seed),
    )


def _text(split: str, arguments: argparse.Namespace) -> TokenizedText:
    return tokenize(load_documents(DataConfig(text=arguments.text, split=split)), load_tokenizer(arguments.model))


def _learned(model: PreTrainedModel) -> dict[str, object]:
    assert isinstance(model, FastWeightsForCausalLM)
    layer = model.fast_weight_layer
    assert layer is not None
    if not layer.settings.updates:
        return {}
    learned: dict[str, object] = {"step_sizes": layer.step_sizes().tolist()}
    if layer.settings.decay == "scalar":
        learned["kept_a_token"] = layer.decay_logit.sigmoid().tolist()
    return learned


def _evaluate(model: PreTrainedModel, text: TokenizedText, way: str, arguments: argparse.Namespace) -> float:
    settings = replace(WAYS[way], max_tokens=arguments.tokens, batch_size=1)
    return evaluate(model, text, block_size=arguments.block_size, config=settings).loss / math.log(2)


def _dynamic(base: PreTrainedModel, text: TokenizedText, arguments: argparse.Namespace, results: Results) -> None:
    jobs = [(way, rule) for way in ("documents", "one stream") for rule in arguments.dynamic]
    jobs = [(way, rule) for way, rule in jobs if results.misses(rule, way, 0)]
    validation = _text("validation", arguments) if jobs else None
    training = _text("train", arguments) if any(rule == "rms" for _, rule in jobs) else None
    for way, rule in jobs:
        row = compare(
            base,
            text,
            ComparisonConfig(methods=(rule,), contexts=("stream",), tune_tokens=arguments.tune_tokens),
            block_size=arguments.block_size,
            evaluation=EvaluationConfig(max_tokens=arguments.tokens, carry_documents=WAYS[way].carry_documents),
            validation=validation,
            training=training,
            say=console.print,
        )[-1]
        assert row.settings is not None
        results.add(
            rule,
            way,
            0,
            row.evaluation.loss / math.log(2),
            time_ratio=row.time_ratio,
            peak_bytes_ratio=row.peak_bytes_ratio,
            step_size=row.settings.step_size,
            decay=row.settings.decay,
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
