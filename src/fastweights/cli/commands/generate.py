"""`fastweights generate`"""

from __future__ import annotations

import io
import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fastweights.cli.console import Line, note
from fastweights.cli.sampling import check_sampling, sampling_settings
from fastweights.errors import FastWeightsError, check_seed
from fastweights.settings.conversion import KeptDtype
from fastweights.settings.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator

EMBEDDED_START = "def "
"""Prompt of the embedded model where none is given: it knows Python alone."""


def generate(
    model: str = "embedded",
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    prompt_file: tuple[Path, ...] = (),
    lines: bool = False,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = (),
    beams: int = 1,
    seed: int = 0,
    memory: Path | None = None,
    weights: Weights | None = None,
    softmax_dtype: KeptDtype | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Go on with a text; a converted model does so at constant time and memory per token.

    Parameters
    ----------
    model
        A folder, a .gguf file, a hub name, "embedded", "smollm2" or "smollm2-base".
    prompt
        Text to go on with; "-" reads standard input. Without one, the model begins.
    prompt_file
        File that is a prompt, plain, .gz, .bz2 or .xz; may be given several times.
    lines
        Each line of the prompt, or of the files, is a prompt of its own; they are answered one after another, also
        after one that is refused.
    max_new_tokens
        Tokens to generate at most.
    temperature
        0 takes the likeliest token, higher values sample; by default as the model's generation_config says, or 0.8 if
        that does not sample, with beams 0.
    top_k
        Tokens to sample from; by default as that says, or 50.
    top_p
        Sample from the likeliest tokens that together have this probability; by default as that says, or 0.95 if it
        does not sample.
    repetition_penalty
        Makes tokens that were generated less likely; by default as that says, or 1.1 if it does not sample, 1 if it
        does or at temperature 0.
    stop
        Text before which to end; may be given several times.
    beams
        Beams of a beam search, 1 for none.
    seed
        Seed of sampling, of each prompt.
    memory
        File that `fastweights read` made, with the same weights: go on from the text that was read.
    weights
        Keep matrices as "bf16", "int8" or "int4": less memory, more tokens a second, a little less exact.
    softmax_dtype
        "int8" keeps keys and values of softmax attention in eight bits: a quarter of the memory, and faster steps.
    device
        Where to compute: "cpu", whose steps have kernels of their own, or a GPU, such as "cuda".
    json
        Print a line of JSON for each prompt: prompt, text, tokens, seconds, and why it stops ("end", "length", "stop").
    """
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    check_sampling(asked, max_new_tokens=max_new_tokens, beams=beams)
    if "" in stop:
        raise FastWeightsError("a stop text is empty: give one of a character or more")
    check_seed(seed)
    prompts = _prompts(model, prompt, prompt_file, lines, memory)

    from transformers import set_seed

    from fastweights.cli.answers import Speaker
    from fastweights.models.conversion import load_for_decoding
    from fastweights.models.loading import load_tokenizer, on_device
    from fastweights.reading.memory import load_memory

    tokenizer, loaded = load_tokenizer(model), on_device(load_for_decoding(model, weights, softmax_dtype), device)
    remembered = None if memory is None else load_memory(loaded, memory)
    settings = sampling_settings(loaded.generation_config, asked, max_new_tokens=max_new_tokens, beams=beams)
    line = Line()
    speaker = Speaker(loaded, tokenizer, remembered, settings, stop, write=_ignore if json else line.write)
    refused = 0
    for number, text in enumerate(prompts, 1):
        set_seed(seed)
        try:
            answer = asdict(speaker.answer(text))
        except BaseException as error:
            line.end()
            if not (lines and isinstance(error, FastWeightsError)):
                raise
            refused += 1
            answer = {"error": str(error)}
            note(f"line {number}: {error}")
        print(json_format.dumps({"prompt": text, **answer}) if json else "", flush=True)
        line.begun = False
    if refused:
        raise FastWeightsError(
            f"{refused} of {number} prompts were refused, each with a line above; the others were answered"
        )


def _prompts(
    model: str, prompt: str | None, files: tuple[Path, ...], lines: bool, memory: Path | None
) -> Iterator[str]:
    """The prompts one by one; what can be said of them at once is."""
    from fastweights.reading.text import STANDARD_INPUT, check_text, text_lines, whole_text

    if prompt is not None and files:
        raise FastWeightsError("a prompt and a prompt_file are given: give one of the two")
    if prompt is None and not files:
        if lines:
            raise FastWeightsError('lines are asked for, and no prompts given: give prompt_file, or "-" as the prompt')
        return iter([EMBEDDED_START if model == "embedded" and memory is None else ""])
    if prompt is not None and prompt != "-":
        try:
            prompt.encode()
        except UnicodeError as error:
            raise FastWeightsError(f"the prompt is no UTF-8 text ({error}): give text") from error
        return iter([line.removesuffix("\n") for line in io.StringIO(prompt)] if lines else [prompt])
    files = files or (STANDARD_INPUT,)
    for file in files:
        check_text(file)
    if lines:
        return (line for file in files for line in text_lines(file))
    return map(whole_text, files)


def _ignore(text: str) -> None:
    pass
