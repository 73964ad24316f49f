"""`fastweights eval`"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import rich
from cyclopts import Parameter
from rich.table import Table

from fastweights.data import DataConfig, load_documents, tokenize
from fastweights.evaluation import EvaluationConfig
from fastweights.evaluation import evaluate as run
from fastweights.models import load_model
from fastweights.sources import load_tokenizer, resolve_model


def evaluate(
    *models: str,
    text: Annotated[DataConfig, Parameter(name="*")] = DataConfig(split="test"),  # noqa: B008 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    json: bool = False,
) -> None:
    """Loss, perplexity and bits per byte of models on the same text.

    Parameters
    ----------
    models
        Models to compare: folders, .gguf files, hub names or "embedded".
    json
        Print JSON instead of a table.
    """
    if Path(text.text).is_file():
        text = replace(text, split="train")  # a file has no other
    results = {}
    for source in models or ("embedded",):
        held_out = tokenize(load_documents(text), load_tokenizer(source))
        model = load_model(resolve_model(source))
        results[source] = run(model, held_out, block_size=text.block_size, config=evaluation)
    if json:
        rich.print_json(data={source: asdict(result) for source, result in results.items()})
        return
    table = Table("model", title=f"{text.text}, split {text.split}, {evaluation.context} of {text.block_size} tokens")
    for column in ("tokens", "loss", "perplexity", "bits/byte"):
        table.add_column(column, justify="right")
    for source, result in results.items():
        row = (f"{result.tokens:,}", f"{result.loss:.4f}", f"{result.perplexity:,.3f}", f"{result.bits_per_byte:.4f}")
        table.add_row(source, *row)
    rich.print(table)
