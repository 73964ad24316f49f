"""The demo: the embedded transformer becomes a recurrent model twice, in minutes, and shows what that gives.

Pure is the paper's form, fast weights alone; hybrid has an exact softmax window of a few tokens beside them. Both keep
a state of constant size. Then the hybrid model gets a Fast Weight Layer, and unseen text is read static, with dynamic
evaluation and with the layer. At the same time, in a process beside, the pure model is trained, and a real one is
judged and reads a long text (`demo_smollm2.py`). What a token costs is measured at the end, when nothing else runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from fastweights.cli.beside import beside
from fastweights.cli.demo_smollm2 import (
    Judged,
    Reading,
    RealModels,
    RealResult,
    answers,
    judge,
    load_real,
    read_long_text,
    time_smollm2,
)
from fastweights.cli.plots import plot_comparison, plot_decoding, plot_training
from fastweights.data import load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.comparison import MethodResult, compare
from fastweights.evaluation.cost import DecodeCost, decode_costs
from fastweights.files import check_output_folder, only_run, write_text
from fastweights.models import load_model
from fastweights.models.loading import load_tokenizer, resolve_model
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.demo import DemoConfig
from fastweights.settings.evaluation import ComparisonConfig, EvaluationConfig, HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, MetaConfig, RunConfig, TrainConfig
from fastweights.training.pipeline import StageResult, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from transformers import PreTrainedModel

    from fastweights.cli.beside import Beside
    from fastweights.evaluation.perplexity import Evaluation

_READ_AT_MOST = 1024
"""Tokens that the small models really read to get to a long context."""
PROMPT = 'def read_lines(path):\n    """Read '


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured."""

    stages: dict[str, list[StageResult]]
    decode: dict[str, list[DecodeCost]]
    samples: dict[str, str]
    comparison: list[MethodResult]
    real: RealResult | None = None
    files: list[Path] = field(default_factory=list)


def train_config(name: str, config: DemoConfig) -> TrainConfig:
    """The demo's training run of "pure" or "hybrid"."""
    steps = max(1, config.tokens // 1024)
    # Many small steps, and large ones for gates and factors: they have far to go.
    if name == "pure":
        # Far from the teacher at first: short time constants too.
        convert = ConversionConfig(positions="drop", gate_bias=(-2.0, 6.0))
        (rate, of_gates, of_factors), weights = (1e-3, 2e-2, 0.3), "all"
    else:
        convert = ConversionConfig(positions="drop", window=config.window)
        (rate, of_gates, of_factors), weights = (1e-3, 3e-2, 1e-1), "attention"
    finetune = FinetuneConfig(
        steps=steps,
        batch_size=1,
        learning_rate=rate,
        new_learning_rate=of_gates,
        factor_learning_rate=of_factors,
        warmup_steps=min(2, steps),
        weights=weights,
    )
    return TrainConfig(
        output=config.output / name,
        overwrite=config.overwrite,
        held_out="test",
        stage="finetune",
        convert=convert,
        finetune=finetune,
        evaluation=HeldOutConfig(max_tokens=config.held_out_tokens),
        run=RunConfig(log_every=max(1, finetune.steps // 15)),
    )


def run_demo(config: DemoConfig, say: Callable[[str], None]) -> DemoResult:
    """Run everything and write results.json and the pictures.

    Args:
        say: called with a line about each part before it begins.
    """
    check_output_folder(config.output, overwrite=config.overwrite)
    with only_run(config.output):
        return _run_alone(config, say)


def _run_alone(config: DemoConfig, say: Callable[[str], None]) -> DemoResult:
    with beside(config.output / "beside.log") as other:
        say("pure: fast weights alone, from the embedded transformer, trained in a process beside this one")
        pure = other.do(train, train_config("pure", config))
        judging, reading = (other.do(judge, config), other.do(read_long_text, config)) if config.real else (None, None)
        say(f"hybrid: fast weights and an exact window of {config.window}, from the embedded transformer")
        hybrid = train(train_config("hybrid", config))
        say("the hybrid model gets a Fast Weight Layer, which learns to learn from what it reads")
        train(layer_config(config))
        say("unseen modules are read static, with dynamic evaluation and with the layer")
        compared = comparison(config)
        stages = {"pure": other.result(pure, "pure"), "hybrid": hybrid}
        source = resolve_model(TrainConfig().model)
        models: dict[str, PreTrainedModel] = {name: load_model(config.output / name) for name in stages}
        models = {"teacher": load_model(source), **models}
        say("the same prompt, by all three")
        samples = {name: sample(model, source) for name, model in models.items()}
        real = None if judging is None or reading is None else _real(other, judging, reading, say)

    say(f"what a token costs, and size of the state, of the small models at contexts up to {config.contexts[-1]:,}")
    decode = decode_costs(models, config.contexts, read_at_most=_READ_AT_MOST)
    folders = {name: config.output / name for name in stages}
    names = ("training.png", "decoding.png", "comparison.png", "results.json")
    files = [config.output / name for name in names]
    plot_training(folders, files[0])
    plot_decoding(decode, models["teacher"].config.max_position_embeddings, files[1])
    plot_comparison(compared, files[2])
    result = DemoResult(stages, decode, samples, compared, files=files)
    _write(result, files[3])
    if real is not None:
        timed = time_smollm2(*real, config, say)
        result = replace(result, real=timed, files=[*files, *timed.files])
        _write(result, files[3])
    return result


def _real(
    other: Beside, judging: Future[dict[str, Evaluation]], reading: Future[Reading], say: Callable[[str], None]
) -> tuple[RealModels, RealResult] | None:
    """The real model, its answers, and what came of it in the process beside.

    All else is worth showing without it, or its long text.
    """
    say("a real model: SmolLM2-135M-Instruct, and the adapter that ships with the package")
    try:
        models = load_real()
        say("it reads a letter with a question, as do the base model, and its window untrained")
        samples = answers(models)
        say("and in the process beside it was judged, and reads Python's manual")
        judged = Judged(other.result(judging, "its parts"), samples)
    except FastWeightsError as error:
        say(f"it is left out: {error}")
        return None
    try:
        found = other.result(reading, "the long text")
    except FastWeightsError as error:
        say(f"the long text is left out: {error}")
        return models, RealResult(judged)
    return models, RealResult(judged, found, files=[found.memory])


def _write(result: DemoResult, file: Path) -> None:
    write_text(file, json.dumps(results(result), indent=2) + "\n")


def layer_config(config: DemoConfig) -> TrainConfig:
    """The demo's training run of a Fast Weight Layer on the hybrid model."""
    return TrainConfig(
        model=str(config.output / "hybrid"),
        output=config.output / "learning",
        overwrite=config.overwrite,
        stage="meta",
        held_out="validation",
        meta=MetaConfig(steps=config.meta_steps),
        evaluation=HeldOutConfig(max_tokens=min(8192, config.held_out_tokens)),
    )


def comparison(config: DemoConfig) -> list[MethodResult]:
    """Read the same unseen text in several ways with the model that has a Fast Weight Layer."""
    settings = layer_config(config)
    tokenizer = load_tokenizer(settings.model)
    validation, text = (
        tokenize(load_documents(DataConfig(split=split)), tokenizer) for split in ("validation", "test")
    )
    return compare(
        load_model(settings.output),
        text,
        ComparisonConfig(
            methods=("static", "sgd", "fwl"), contexts=("stream",), tune_tokens=config.held_out_tokens // 4
        ),
        evaluation=EvaluationConfig(max_tokens=config.held_out_tokens),
        validation=validation,
        say=print,
    )


def results(result: DemoResult) -> dict[str, object]:
    """What results.json holds."""
    stages = result.stages
    return {
        "retention": {name: run[-1].retention for name, run in stages.items()},
        "tokens": {name: run[-1].tokens for name, run in stages.items()},
        "loss": {name: {stage.stage: stage.evaluation.loss for stage in run} for name, run in stages.items()},
        "parts": {name: asdict(run[-1])["parts"] for name, run in stages.items() if run[-1].parts},
        "decode": {name: [asdict(cost) for cost in costs] for name, costs in result.decode.items()},
        "samples": result.samples,
        "comparison": [method.plain() for method in result.comparison],
        "smollm2": result.real and result.real.plain(),
    }


@torch.no_grad()
def sample(model: PreTrainedModel, source: str, new_tokens: int = 120) -> str:
    """What a model makes of the demo's prompt; all draw with the same seed."""
    tokenizer = load_tokenizer(source)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    set_seed(0)
    output = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.5, top_k=20
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[union-attr]
