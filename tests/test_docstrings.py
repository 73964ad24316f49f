"""Public functions say what each of their arguments is, and what comes back."""

import inspect

import pytest

import fastweights

FUNCTIONS = [name for name in fastweights.__all__ if inspect.isfunction(getattr(fastweights, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name):
    function = getattr(fastweights, name)
    page = inspect.getdoc(function) or ""
    described = page.partition("Args:\n")[2]
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in described
    if inspect.signature(function).return_annotation not in ("None", None):
        assert "Returns:\n" in page
