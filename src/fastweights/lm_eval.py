"""`python -m fastweights.lm_eval` is lm-eval's command line, which then knows `--model fastweights`."""

import importlib
import sys

from fastweights.errors import FastWeightsError


def main() -> None:
    """Entry point: what we refuse is one line; all else is lm-eval's."""
    try:
        importlib.import_module("fastweights.evaluation.lm_eval")  # lm-eval learns of it
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except FastWeightsError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
