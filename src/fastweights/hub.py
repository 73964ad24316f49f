"""Names on the Hugging Face hub, asked for once and briefly: a misspelt folder looks like one."""

from __future__ import annotations

import threading
from typing import Literal

from fastweights.files import said


def is_hub_name(name: str) -> bool:
    """Whether the hub could have something of this name: `name` or `owner/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def why_not_on_hub(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub does not give a model or dataset, None if it does.

    The libraries that download it would try again for a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as SECONDS
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    found: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
            found.append(None)
        except RepositoryNotFoundError:
            found.append(f"the Hugging Face hub has no such {kind}, or not for you")
        except OfflineModeIsEnabled:
            found.append("the Hugging Face hub is not asked, as HF_HUB_OFFLINE is set")
        except Exception as error:
            found.append(f"the Hugging Face hub cannot be reached ({said(error)})")

    # No time limit of a request holds for the look-up of the hub's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if found:
        return found[0]
    return f"the Hugging Face hub cannot be reached within {SECONDS:g} seconds (HF_HUB_ETAG_TIMEOUT says how many)"
