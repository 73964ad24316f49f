"""`fastweights generate`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from transformers import PreTrainedModel, TextStreamer, set_seed

from fastweights.errors import FastWeightsError
from fastweights.memory import load_memory
from fastweights.models import load_model
from fastweights.sources import load_tokenizer, resolve_model
from fastweights.stream import last_position


def generate(
    model: str = "embedded",
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int = 50,
    beams: int = 1,
    seed: int = 0,
    memory: Path | None = None,
) -> None:
    """Go on with a text; a converted model does so at constant time and memory per token.

    Parameters
    ----------
    model
        A folder, a .gguf file, a hub name or "embedded".
    prompt
        Text to go on with; "-" reads standard input.
    max_new_tokens
        Tokens to generate at most.
    temperature
        0 takes the likeliest token; higher values sample.
    top_k
        Tokens to sample from.
    beams
        Beams of a beam search, 1 for none.
    seed
        Seed of sampling.
    memory
        File that `fastweights read` made: go on from the text that was read.
    """
    if max_new_tokens < 1 or beams < 1 or top_k < 1 or not 0 <= temperature < float("inf"):
        raise FastWeightsError(
            f"max_new_tokens is {max_new_tokens}, beams {beams}, top_k {top_k}, temperature {temperature}; "
            "allowed are at least 1, 1, 1 and 0"
        )
    prompt = sys.stdin.read() if prompt == "-" else prompt
    tokenizer, loaded = load_tokenizer(model), load_model(resolve_model(model))
    set_seed(seed)
    arguments = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_k": top_k if temperature > 0 else None,
        "num_beams": beams,
        "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if beams == 1 else None,
    }
    if memory is not None:
        remembered = load_memory(loaded, memory)
        print(prompt, end="", flush=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"] if prompt else None
        output = remembered.generate(None if ids is None else ids[0].long(), **arguments)  # type: ignore[index,union-attr]
    else:
        inputs = tokenizer(prompt or str(tokenizer.bos_token or ""), return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:  # type: ignore[union-attr]
            raise FastWeightsError("the prompt is empty and this model has no token to begin with: give --prompt TEXT")
        _check_room(loaded, inputs["input_ids"].shape[1], max_new_tokens)  # type: ignore[union-attr]
        print(prompt, end="", flush=True)
        with torch.no_grad():
            output = loaded.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator,union-attr]
    if beams > 1:
        print(tokenizer.decode(output, skip_special_tokens=True))


def _check_room(model: PreTrainedModel, prompt: int, new: int) -> None:
    limit = last_position(model)
    if limit is not None and prompt + new > limit + 1:  # the last token is not read
        raise FastWeightsError(
            f"the prompt has {prompt} tokens, max_new_tokens is {new}, and this model's absolute positions end at "
            f"{limit}: take fewer, or a model that was converted with --positions drop"
        )
