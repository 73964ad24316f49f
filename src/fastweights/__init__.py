"""Language models that remember in fast weights.

Once this package is imported, `AutoModelForCausalLM.from_pretrained` loads its models. What is slow to import waits
until it is used: names come from where `__init__.pyi` says when they are first asked for, and transformers learns of
the models when its own auto classes are imported.
"""

import importlib
import sys
from types import ModuleType

import lazy_loader
import wrapt

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_AUTO_CLASSES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.modeling_auto": "AutoModelForCausalLM",
}
"""Modules of transformers after whose import our models are registered, and what each has once it is whole."""


def _register(_: ModuleType) -> None:
    loaded = {name: sys.modules[name] for name in _AUTO_CLASSES if name in sys.modules}
    if all(hasattr(module, _AUTO_CLASSES[name]) for name, module in loaded.items()):  # they import one another
        importlib.import_module("fastweights.models.modeling")


for _name in _AUTO_CLASSES:
    wrapt.register_post_import_hook(_register, _name)
