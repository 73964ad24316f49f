"""`fastweights generate`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from cyclopts import Parameter
from transformers import PreTrainedModel, TextStreamer, set_seed

from fastweights.errors import FastWeightsError, check_seed
from fastweights.models import load_model
from fastweights.models.loading import load_tokenizer, resolve_model
from fastweights.reading.memory import load_memory
from fastweights.reading.stream import last_position

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


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
    check_seed(seed)
    prompt = _given(prompt)
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
    try:
        output = _go_on(loaded, tokenizer, prompt, memory, arguments)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise FastWeightsError(
            f"no token can be drawn at temperature {temperature}: the model's logits are not finite, or divided by so "
            "low a temperature they are not; take 0 for the likeliest token, or give a model that predicts"
        ) from error
    if beams > 1:
        print(tokenizer.decode(output, skip_special_tokens=True))


def _given(prompt: str) -> str:
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()
    except UnicodeError as error:
        raise FastWeightsError(f"the prompt is no UTF-8 text ({error}): give text") from error
    return prompt


def _go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    memory: Path | None,
    arguments: dict[str, Any],
) -> Tensor:
    """Print the prompt, and what comes after it if it streams; its token ids."""
    if memory is not None:
        remembered = load_memory(model, memory)
        print(prompt, end="", flush=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"] if prompt else None
        return remembered.generate(None if ids is None else ids[0].long(), **arguments)  # type: ignore[index,union-attr]
    inputs = tokenizer(prompt or str(tokenizer.bos_token or ""), return_tensors="pt")
    length = inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    if length == 0:
        raise FastWeightsError("the prompt is empty and this model has no token to begin with: give --prompt TEXT")
    _check_room(model, length, arguments["max_new_tokens"])
    print(prompt, end="", flush=True)
    with torch.no_grad():
        return model.generate(**inputs, **arguments)[0, length:]  # type: ignore[operator]


def _check_room(model: PreTrainedModel, prompt: int, new: int) -> None:
    limit = last_position(model)
    if limit is not None and prompt + new > limit + 1:  # the last token is not read
        raise FastWeightsError(
            f"the prompt has {prompt} tokens, max_new_tokens is {new}, and this model's absolute positions end at "
            f"{limit}: take fewer, or a model that was converted with --positions drop"
        )
