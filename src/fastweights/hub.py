"""Names on the Hugging Face hub, asked for once and briefly: a misspelt folder looks like one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastweights.errors import FastWeightsError, reason_of
from fastweights.files import said


def is_hub_name(name: str) -> bool:
    """Whether the hub could have something of this name: `name` or `owner/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class OnHub(NamedTuple):
    """What the hub says of a name."""

    reason: str | None
    """Why it does not give that; None if it does."""
    files: frozenset[str] = frozenset()
    """Names of the files there are."""


_asked: dict[tuple[str, str], tuple[float, OnHub]] = {}
_LASTS = 60
"""Seconds for which an answer holds: a command asks for its tokenizer, its adapter and its model."""


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> OnHub:
    """Whether the hub gives a model or dataset; the libraries that download it would try again for a minute."""
    when, answer = _asked.get((name, kind), (-float(_LASTS), OnHub(None)))
    if time.monotonic() - when >= _LASTS:
        answer = _answer(name, kind)
        _asked[name, kind] = time.monotonic(), answer
    return answer


def _answer(name: str, kind: Literal["model", "dataset"]) -> OnHub:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as SECONDS
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    found: list[OnHub] = []

    def ask() -> None:
        try:
            about: Any = HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
            found.append(OnHub(None, frozenset(file.rfilename for file in about.siblings or ())))
        except RepositoryNotFoundError:
            found.append(OnHub(f"the Hugging Face hub has no such {kind}, or not for you"))
        except OfflineModeIsEnabled:
            found.append(OnHub("the Hugging Face hub is not asked, as HF_HUB_OFFLINE is set"))
        except Exception as error:
            found.append(OnHub(f"the Hugging Face hub cannot be reached ({said(error)})"))

    # No time limit of a request holds for the look-up of the hub's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if found:
        return found[0]
    waited = f"{SECONDS:g} seconds (HF_HUB_ETAG_TIMEOUT says how many)"
    return OnHub(f"the Hugging Face hub cannot be reached within {waited}")


def fetch(name: str, *files: str) -> Path:
    """The folder with these files of a model on the hub, which are downloaded if they are not there.

    Raises:
        FastWeightsError: one could not be had whole.
    """
    from huggingface_hub import hf_hub_download

    try:
        places = [Path(hf_hub_download(name, file)) for file in files]
    except Exception as error:  # of the network, the disk, the hub
        raise FastWeightsError(f"cannot download {' and '.join(files)} of {name}: {reason_of(error)}") from error
    return places[0].parent


def fetched(name: str, file: str) -> Path | None:
    """The folder with a file of a model on the hub that was downloaded earlier; None if it was not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found).parent if isinstance(found, str) else None
