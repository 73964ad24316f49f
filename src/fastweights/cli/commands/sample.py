"""`fastweights sample`"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fastweights.cli.console import note, printable, say
from fastweights.cli.stops import Stopped, Stops
from fastweights.errors import FastWeightsError
from fastweights.files import check_output_file, only_writer
from fastweights.progress import Progress
from fastweights.settings.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.reading.sampled_text import SampledText

_SAVE_SECONDS = 60


def sample(
    model: str,
    output: Path,
    config: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),  # noqa: B008 (frozen)
    *,
    prompt_file: tuple[Path, ...] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample texts from a model itself, for `train --data.text OUTPUT`: no corpus is needed.

    Stopped with Ctrl-C or by SIGTERM, it keeps what was sampled; with --resume it goes on, and the file becomes what it
    would have been.

    Parameters
    ----------
    model
        A folder, a .gguf file, a hub name or "embedded".
    output
        File to write, .jsonl or .jsonl.gz: a document a line, with the field `text`.
    prompt_file
        File each of whose lines begins documents, as it is, or is what is said first in conversations; may be given
        several times.
    resume
        Go on with a file that the same settings began; more tokens may be asked for.
    overwrite
        Replace what is at `output`.
    """
    from fastweights.models.loading import resolve_model
    from fastweights.reading.sampled_text import SampledText, check_name_of_samples, name_of_run
    from fastweights.reading.sampling import sample as run

    if resume and overwrite:
        raise FastWeightsError("resume goes on with a file and overwrite starts it anew: give one of them")
    check_name_of_samples(output)
    source = resolve_model(model)
    inputs = [path for path in (*prompt_file, Path(source)) if path.exists()]
    check_output_file(output, overwrite=overwrite or resume, inputs=inputs, advice="give another")
    prompts = _prompts(prompt_file)
    loaded, tokenizer = _load(model, config)
    stops = Stops()
    with only_writer(output):
        samples = SampledText(output, name_of_run(loaded, config, prompts), resume=resume)
        before, same, start = (samples.documents, samples.tokens), 0, time.perf_counter()
        try:
            with stops, Progress(printable(f"sampling from {model}"), unit="tokens", quick=True) as progress:
                batches = run(
                    loaded,
                    tokenizer,
                    config,
                    prompts=prompts,
                    documents=samples.documents,
                    tokens=samples.tokens,
                    progress=lambda tokens: progress(tokens, max(tokens, config.tokens)),
                )
                saved = time.monotonic()
                for batch in batches:
                    with stops.after():
                        samples.add(batch)
                        same += sum(document.comes_back for document in batch)
                        if time.monotonic() - saved > _SAVE_SECONDS:
                            samples.save()
                            saved = time.monotonic()
        except Stopped:
            samples.save()
            how = "--resume in the place of --overwrite" if overwrite else "--resume"
            note(f"stopped: {_told(samples)}; go on with the same command and {how}")
            sys.exit(128 + stops.number)
        except FastWeightsError:
            samples.save()
            raise
        samples.save()
    documents, tokens = samples.documents - before[0], samples.tokens - before[1]
    rate = tokens / (time.perf_counter() - start)
    line = _told(samples)
    if documents:
        line += (
            f", {rate:,.0f} a second; tokenized again, {same / documents:.0%} have the very tokens that were sampled"
        )
    say(line)


def _load(model: str, config: SamplingConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from fastweights.models.loading import load_model, load_tokenizer
    from fastweights.training.runs import placed

    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return placed(loaded), tokenizer


def _prompts(files: tuple[Path, ...]) -> list[str]:
    from fastweights.reading.text import text_lines

    found = [line for file in files for line in text_lines(file) if line]
    if files and not found:
        raise FastWeightsError("all lines of prompt_file are empty: give some that are not, or leave it out")
    return found


def _told(samples: SampledText) -> str:
    return f"{samples.path}: {samples.documents:,} documents, {samples.tokens:,} tokens"
