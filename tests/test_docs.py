"""The documents speak of code that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
METHODS = (ROOT / "docs" / "methods.md").read_text()
REFERENCES = sorted(set(REFERENCE.findall(METHODS)))


def names(path: Path) -> set[str]:
    """Functions, classes, their methods and constants of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_site_has_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) == pages


@pytest.mark.parametrize(("file", "name"), REFERENCES, ids=[f"{file}:{name}" for file, name in REFERENCES])
def test_methods_name_code_that_is_there(file, name):
    path = ROOT / "src" / "fastweights" / file
    assert path.is_file(), f"docs/methods.md names {file}, which is not there"
    assert name in names(path), f"docs/methods.md names {name}, which is not in {file}"


def test_every_equation_says_where_it_is_computed():
    """Each indented block has such a name in the paragraph before it, or after it."""
    parts = re.split(r"\n\n", METHODS)
    for i, part in enumerate(parts):
        if part.startswith("    ") and "=" in part:
            around = "".join(parts[max(0, i - 1) : i + 2])
            assert REFERENCE.search(around) or "in the paper" in around, f"who computes this?\n{part}"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_links_and_files_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for file in re.findall(r"`((?:recipes|docs|benchmarks|tests)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / file).exists(), f"{page.name} names {file}"


def test_the_words_of_contributing_are_those_of_the_code():
    """Each word in the table's first column stands in the code under the name in its second."""
    table = re.findall(r"^\| ([^|]+) \| `([^`|]+)`[^|]* \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(table) > 10
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for word, name in table:
        assert re.search(rf"\b{re.escape(name.split('.')[-1].rstrip('()'))}\b", source), f"{word}: {name} is gone"
