"""The one exception that users see: what was given, what is allowed, what to do, in one line."""


class FastWeightsError(ValueError):
    """An input that the library refuses; its message is one line and complete."""
