"""`fastweights eval`"""

from __future__ import annotations

import json as json_format
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
from cyclopts import Parameter

from fastweights.cli.console import printable, say
from fastweights.cli.tables import print_divergences, print_methods, print_positions, print_recall
from fastweights.errors import FastWeightsError
from fastweights.files import check_output_folder, make_folder, write_text
from fastweights.settings.evaluation import DYNAMIC_RULES, ComparisonConfig, EvaluationConfig, RecallConfig
from fastweights.settings.text import DataConfig, HeldOutDataConfig
from fastweights.settings.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText
    from fastweights.evaluation.comparison import MethodResult
    from fastweights.evaluation.divergence import Divergence
    from fastweights.evaluation.recall import Recall
    from fastweights.progress import Progress

_RESULTS = "results.json"
_PICTURES = ("evaluation", "gains")


def evaluate(
    models: tuple[str, ...] = ("embedded",),
    *,
    text: Annotated[HeldOutDataConfig, Parameter(name="*")] = HeldOutDataConfig(),  # noqa: B008 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    comparison: Annotated[ComparisonConfig, Parameter(name="*")] = ComparisonConfig(),  # noqa: B008 (frozen)
    parts: bool = False,
    divergence: bool = False,
    teacher: str | None = None,
    recall: bool = False,
    recall_test: RecallConfig = RecallConfig(),  # noqa: B008 (frozen)
    weights: Weights | None = None,
    json: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Loss, perplexity, bits per byte, time and peak memory of models on the same text, read in several ways.

    Parameters
    ----------
    models
        Models to compare: folders, .gguf files, hub names, "embedded", "smollm2" or "smollm2-base".
    parts
        Read with each part of a hybrid model, too: its window alone, its fast weights alone, the window that its
        teacher gives untrained, and the teacher.
    divergence
        Measure as well how far what a model expects next is from what the model expects that it was made of: their KL
        divergence, and how often both find the same token the likeliest.
    teacher
        The model that was converted, where a converted one does not name it; with --divergence of any model, such as
        one that `weights` is to round, what it is compared with.
    recall
        Test as well whether a name that a text said is recalled after so many tokens.
    weights
        Keep matrices as "bf16", "int8" or "int4": less memory, more tokens a second, a little less exact.
    json
        Print JSON instead of a table.
    output
        Folder for results.json and pictures: bits per byte and cost, and where each method gains.
    overwrite
        Replace those that are there, or write beside a model.
    """
    from fastweights.evaluation.comparison import compare
    from fastweights.evaluation.recall import check_distances
    from fastweights.models.loading import load_model, load_tokenizer
    from fastweights.models.quantisation import check_not_quantised
    from fastweights.progress import Progress
    from fastweights.training.runs import placed

    if not models:
        raise FastWeightsError("models is empty: name at least one, or leave it out for the embedded one")
    if teacher is not None and not (parts or divergence):
        raise FastWeightsError("teacher was given, which only parts and divergence need: give --parts or --divergence")
    if recall_test != RecallConfig() and not recall:
        raise FastWeightsError("recall_test was given, which says how to test recall: give --recall, too")
    models = tuple(dict.fromkeys(models))
    if output is not None:
        _check_output(output, models, overwrite=overwrite)
    dynamic = set(comparison.methods or ()) & {"sgd", "rms"}
    if Path(text.text).is_file():
        if "rms" in dynamic or (dynamic and comparison.tune_tokens):
            raise FastWeightsError(
                f"{text.text} is one file; rms and tuning need text of their own: "
                "give a folder with train, validation and test files"
            )
        if text.split not in (HeldOutDataConfig.split, "train"):
            raise FastWeightsError(f"{text.text} is one file and has no split {text.split!r}: leave split out")
        text = replace(text, split="train")  # a file has no other
    elif dynamic:
        _check_unseen(text.split, tuned=bool(comparison.tune_tokens), sizes="rms" in dynamic)
    results: dict[str, list[MethodResult]] = {}
    recalled: dict[str, dict[str, list[Recall]]] = {}
    diverged: dict[str, dict[str, Divergence]] = {}
    # With the tokenizers of all, a wrong name is noticed before the first model has read anything.
    held_out = {source: _read(text, source) for source in models}
    for source in models if recall else ():
        check_distances(load_tokenizer(source), recall_test)
    with _kept_for_later(results) as refused, Progress(unit="tokens") as progress:
        for source in held_out:
            model = placed(load_model(source, weights=weights))
            if dynamic:
                check_not_quantised(model, "dynamic evaluation")
            base = _teacher_of(model, source, teacher, parts=parts) if parts or divergence else None
            results[source] = compare(
                model,
                held_out[source],
                comparison,
                block_size=text.block_size,
                evaluation=evaluation,
                validation=_read(replace(text, split="validation"), source)
                if dynamic and comparison.tune_tokens
                else None,
                training=_read(replace(text, split="train"), source) if "rms" in dynamic else None,
                teacher=base if parts else None,
                say=lambda line, source=source: progress.begin(printable(f"{source}: {line}")),
                progress=progress,
            )
            if recall:
                recalled[source] = _recall(model, source, results[source], base, recall_test, progress)
            if divergence:
                assert base is not None
                diverged[source] = _divergences(
                    model, held_out[source], results[source], base, text.block_size, evaluation, progress
                )
    data = {
        source: _plain(rows, recalled.get(source, {}), diverged.get(source, {})) for source, rows in results.items()
    }
    if json:
        rich.print_json(data=data)
    else:
        for source, rows in results.items():
            print_methods(source, rows, f"{text.text}, split {text.split}, blocks of {text.block_size} tokens")
            print_positions(source, rows)
            if source in recalled:
                print_recall(source, recalled[source])
            if source in diverged:
                print_divergences(source, diverged[source])
    if output is not None:
        _write(output, data, results, held_out)
        if not json:
            say(f"results.json and the pictures are in {output}")
    if refused:
        raise refused[0]


@contextmanager
def _kept_for_later(results: Mapping) -> Iterator[list[FastWeightsError]]:
    """Ends with an error in the list, where there are results to be told first; else with the error."""
    refused: list[FastWeightsError] = []
    try:
        yield refused
    except FastWeightsError as error:
        if not results:
            raise
        refused.append(error)


def _check_unseen(split: str, *, tuned: bool, sizes: bool) -> None:
    """Refuse to read a text with what dynamic evaluation was tuned on, or has its gradients' sizes from."""
    from fastweights.data import overlap

    for other, used, what in (("validation", tuned, "step sizes are tuned on"), ("train", sizes, "rms has sizes from")):
        if used and overlap(split, other):
            raise FastWeightsError(f"split is {split}, and {what} split {other}: read another, such as test")


def _read(config: DataConfig, model: str) -> TokenizedText:
    from fastweights.data import load_documents, tokenize
    from fastweights.models.loading import load_tokenizer

    return tokenize(load_documents(config), load_tokenizer(model))


def _teacher_of(model: PreTrainedModel, source: str, teacher: str | None, *, parts: bool) -> PreTrainedModel:
    from fastweights.evaluation.divergence import check_vocabularies
    from fastweights.evaluation.parts import is_hybrid
    from fastweights.models.loading import load_model
    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.training.teacher import load_teacher

    if parts and not is_hybrid(model):
        raise FastWeightsError(f"{source} has no layers with both fast weights and a window: leave --parts out")
    if isinstance(model, FastWeightsForCausalLM):
        return load_teacher(model, teacher).to(model.device)  # type: ignore[arg-type]
    if teacher is None:
        raise FastWeightsError(f"{source} was not converted: name by --teacher what --divergence is to compare it with")
    original = load_model(teacher)
    check_vocabularies(model, original)
    return original.to(model.device)  # type: ignore[arg-type]


def _recall(
    model: PreTrainedModel,
    source: str,
    rows: list[MethodResult],
    teacher: PreTrainedModel | None,
    config: RecallConfig,
    progress: Progress,
) -> dict[str, list[Recall]]:
    """What each method of the rows recalls, but for dynamic evaluation, whose steps are taken on the text."""
    from fastweights.evaluation.comparison import reading_as
    from fastweights.evaluation.recall import recall
    from fastweights.models.loading import load_tokenizer

    tokenizer, found = load_tokenizer(source), {}
    for method in dict.fromkeys(row.method for row in rows if row.method not in DYNAMIC_RULES):
        progress.begin(printable(f"{source}: recall, {method}"))
        with reading_as(method, model, teacher) as reader:
            found[method] = recall(reader, tokenizer, config, progress=progress)
    return found


def _divergences(
    model: PreTrainedModel,
    text: TokenizedText,
    rows: list[MethodResult],
    original: PreTrainedModel,
    block_size: int,
    evaluation: EvaluationConfig,
    progress: Progress,
) -> dict[str, Divergence]:
    """Of each row, by its name, but for the original's own and for dynamic evaluation, whose steps are on the text."""
    from fastweights.evaluation.comparison import reading_as
    from fastweights.evaluation.divergence import divergence
    from fastweights.evaluation.parts import TEACHER

    found = {}
    for row in rows:
        if row.method in (*DYNAMIC_RULES, TEACHER):
            continue
        progress.begin(printable(f"divergence, {row.name}"))
        config = replace(evaluation, context=row.context, batch_size=1)
        with reading_as(row.method, model, original) as reader:
            found[row.name] = divergence(
                reader, original, text, block_size=block_size, config=config, progress=progress
            )
    return found


def _plain(
    rows: list[MethodResult], recalled: dict[str, list[Recall]], diverged: dict[str, Divergence]
) -> list[dict[str, object]]:
    """As JSON has it; what a method recalls stands in all of its rows."""
    found = []
    for row in rows:
        entry = row.plain()
        if row.method in recalled:
            entry["recall"] = [asdict(recall) for recall in recalled[row.method]]
        if row.name in diverged:
            entry["divergence"] = asdict(diverged[row.name])
        found.append(entry)
    return found


def _check_output(output: Path, models: tuple[str, ...], *, overwrite: bool) -> None:
    """Refuse to write over what is there, or into a model, unasked."""
    from fastweights.models.loading import resolve_model

    marks = [_mark(i, len(models)) for i in range(len(models))]
    names = [_RESULTS, *(f"{name}{mark}.png" for mark in marks for name in _PICTURES)]
    check_output_folder(output, overwrite=overwrite, names=names)
    for source in models:
        if not overwrite and output.resolve() == Path(resolve_model(source)).resolve():
            raise FastWeightsError(
                f"output {output} is the folder of a model: give another folder, or write beside it with --overwrite"
            )


def _mark(i: int, models: int) -> str:
    """What sets the pictures of one model apart from those of others."""
    return "" if models == 1 else f"-{i + 1}"


def _write(
    output: Path,
    data: dict[str, list[dict[str, object]]],
    results: dict[str, list[MethodResult]],
    texts: dict[str, TokenizedText],
) -> None:
    from fastweights.cli.plots import plot_comparison, plot_gains
    from fastweights.evaluation.gains import gains
    from fastweights.evaluation.perplexity import plain

    make_folder(output)
    written: dict[str, object] = {"models": data, "gains": {}}
    for i, (source, rows) in enumerate(results.items()):
        mark = _mark(i, len(results))
        plot_comparison(rows, output / f"evaluation{mark}.png")
        if len(rows) > 1:
            found = gains(rows, texts[source])
            plot_gains(found, {row.name: row.method for row in rows[1:]}, output / f"gains{mark}.png")
            written["gains"][source] = {  # type: ignore[index]
                grouping: {row: [asdict(gain) for gain in points] for row, points in by_row.items()}
                for grouping, by_row in found.items()
            }
    write_text(output / _RESULTS, json_format.dumps(plain(written), indent=2) + "\n")
