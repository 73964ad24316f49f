from pathlib import Path

from fastweights.cli.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference(), "run `make docs`"


def test_it_lists_what_help_leaves_out():
    assert "--run.adam-beta2" in reference()
