"""The one exception that users see: what was given, what is allowed, what to do, in one line."""


class FastWeightsError(ValueError):
    """An input that the library refuses; its message is one line and complete."""


def reason_of(error: BaseException) -> str:
    """The line of another library's error that says most."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":") if lines else type(error).__name__
