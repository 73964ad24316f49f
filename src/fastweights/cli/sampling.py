"""Options that say how tokens are drawn, of all commands that speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from transformers import GenerationConfig

_USUAL = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
_OF_TRANSFORMERS = 50
"""Tokens that its own `generate` samples from where a model that is to be sampled from does not say how many."""
_TOKENS_ALONE = {"num_return_sequences": 1, "return_dict_in_generate": False}
"""What `generate` is to return, whatever a model's own settings say."""


def check_sampling(asked: dict[str, Any], **counts: int) -> None:
    """Refuse what nothing can be drawn with.

    Args:
        asked: temperature, top_k, top_p and repetition_penalty, in this order; None where nothing was asked for.
        **counts: what else has to be at least 1, such as max_new_tokens and beams.

    Raises:
        FastWeightsError: says what was given and what is allowed.
    """
    temperature, top_k, top_p, penalty = (1 if value is None else value for value in asked.values())
    allowed = min(top_k, *counts.values()) >= 1 and 0 <= temperature < float("inf")
    if not (allowed and 0 < top_p <= 1 and 0 < penalty < float("inf")):
        given = ", ".join(f"{name} {value}" for name, value in (counts | asked).items() if value is not None)
        raise FastWeightsError(
            f"given are {given}; allowed are {', '.join(counts)} and top_k from 1, temperature from 0, top_p above 0 "
            "and up to 1, repetition_penalty above 0"
        )
    sampling = [name for name in ("top_k", "top_p") if asked[name] is not None]
    if sampling and _greedy(asked, counts.get("beams", 1)):
        at = "temperature 0" if asked["temperature"] == 0 else "temperature 0, which beams have by default,"
        raise FastWeightsError(
            f"{sampling[0]} says what to sample from, and at {at} nothing is: leave it out, or give a temperature "
            "above 0"
        )


def sampling_settings(
    own: GenerationConfig, asked: dict[str, Any], *, max_new_tokens: int, beams: int = 1
) -> dict[str, Any]:
    """For transformers' `generate`: what was asked for, else what the model's makers say, else what reads well.

    Args:
        own: the model's.
        asked: as `check_sampling` takes it.
        max_new_tokens: tokens at most.
        beams: 1 for none.
    """
    greedy = _greedy(asked, beams)
    if greedy:
        usual = dict.fromkeys(_USUAL) | {"repetition_penalty": 1.0}
        asked = asked | {"temperature": None}
    elif own.do_sample:
        top_k = _OF_TRANSFORMERS if own.top_k is None else own.top_k
        usual = {"temperature": own.temperature or 1.0, "top_k": top_k, "top_p": own.top_p, "repetition_penalty": 1.0}
    else:
        usual = dict(_USUAL)
    usual["repetition_penalty"] = own.repetition_penalty or usual["repetition_penalty"]
    found = {name: usual[name] if value is None else value for name, value in asked.items()}
    return {**found, **_TOKENS_ALONE, "do_sample": not greedy, "num_beams": beams, "max_new_tokens": max_new_tokens}


def _greedy(asked: dict[str, Any], beams: int) -> bool:
    return asked["temperature"] == 0 or (beams > 1 and asked["temperature"] is None)
