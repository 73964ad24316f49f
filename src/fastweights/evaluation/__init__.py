"""How well a model predicts text, in which ways it can read it, and what that costs."""

from fastweights import registration  # noqa: F401
