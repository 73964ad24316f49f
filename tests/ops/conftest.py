"""One torch thread: these tensors are too small to share out, and torch's threads spin while they wait."""

from __future__ import annotations

import pytest

from tests.ops.problems import threads_of_torch


@pytest.fixture(autouse=True)
def _one_thread():
    with threads_of_torch(1):
        yield
