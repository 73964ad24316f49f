"""Shapes and dtypes that annotations promise, checked while the tests run: the first calls of each function in a test,
and some more that differ in their arguments' shapes or dtypes.

jaxtyping's own import hook decorates functions before their module is whole, which torch's custom ops do not survive,
and needs at run time what these modules import for type checkers alone. So functions are decorated here once everything
is imported, wherever a module holds them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections import Counter
from types import FunctionType, ModuleType

import torch
from beartype import beartype
from jaxtyping import jaxtyped

import fastweights

SELF_CHECKED = {"decay_rule", "delta_rule"}
"""Doors that refuse wrong shapes in words of their own."""
FIRST, CALLS = 2, 8
"""Of each function that are checked in a test: so many whatever they are given, then those given other shapes or dtypes
than those after the first, up to so many. All would take a third of the tests' time, ten and twenty an eighth."""
_SHAPED = re.compile(r"\b(Float|Int|Bool)\[")
_calls: Counter[FunctionType] = Counter()
_seen: set[tuple] = set()


def check_annotations() -> int:
    """Decorate all functions of the package with annotated shapes; returns how many."""
    modules = [fastweights, *_modules()]
    for module in modules:
        _import_for_type_checkers(module)
    checked: dict[int, FunctionType] = {}
    for module in modules:
        for cls in {id(x): x for x in vars(module).values() if inspect.isclass(x)}.values():
            if cls.__module__ == module.__name__:
                for name, function in list(vars(cls).items()):
                    if _is_shaped(function):
                        setattr(cls, name, _checked(function, checked))
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "fastweights"]:
        for name, function in list(vars(module).items()):
            if _is_shaped(function) and function.__module__.startswith("fastweights"):
                setattr(module, name, _checked(function, checked))
    return len(checked)


def begin_test() -> None:
    """Check the first calls anew."""
    _calls.clear()
    _seen.clear()


def _modules() -> list[ModuleType]:
    # kernels compiles when imported, __main__ runs; Triton and lm-eval need not be installed.
    left_out = ("__main__", ".cpu_kernels", ".cpu_forward", ".cpu_backward", ".staging", ".vectors", ".gpu_kernels")
    left_out += (".evaluation.lm_eval",)
    names = [info.name for info in pkgutil.walk_packages(fastweights.__path__, "fastweights.")]
    return [importlib.import_module(name) for name in names if not name.endswith(left_out)]


def _import_for_type_checkers(module: ModuleType) -> None:
    """Make the names of the `if TYPE_CHECKING:` block known, now that no import can be circular any more."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            code = compile(ast.Module(node.body, type_ignores=[]), str(module.__file__), "exec")
            exec(code, vars(module))


def _is_shaped(x: object) -> bool:
    if not isinstance(x, FunctionType) or x.__name__ in SELF_CHECKED or hasattr(x, "is_checked"):
        return False
    return any(_SHAPED.search(str(hint)) for hint in x.__annotations__.values())


def _checked(function: FunctionType, done: dict[int, FunctionType]) -> FunctionType:
    if id(function) not in done:
        done[id(function)] = _decorated(function)
    return done[id(function)]


def _decorated(function: FunctionType) -> FunctionType:
    checked = jaxtyped(typechecker=beartype)(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        # torch.compile cannot look into the checks.
        if torch.compiler.is_compiling() or _calls[function] >= CALLS:
            return function(*args, **kwargs)
        if _calls[function] >= FIRST:
            kind = (function, *map(_kind, args), *((name, _kind(x)) for name, x in kwargs.items()))
            if kind in _seen:
                return function(*args, **kwargs)
            _seen.add(kind)
        _calls[function] += 1
        return checked(*args, **kwargs)

    call.is_checked = True
    return call  # type: ignore[return-value]


def _kind(x: object) -> object:
    return (x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x)
