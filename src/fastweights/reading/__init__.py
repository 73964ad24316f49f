"""Reading without end: streams of text, and memories of what was read."""

from fastweights import registration  # noqa: F401
