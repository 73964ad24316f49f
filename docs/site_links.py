"""For the site: README.md, CONTRIBUTING.md and what names them do so by their places in the repository."""

_PLACES = {
    "](../docs/": "](",
    "](docs/": "](",
    "](../CONTRIBUTING.md": "](contributing.md",
    "](../README.md": "](index.md",
}


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with each page, once other files are included in it."""
    for there, here in _PLACES.items():
        markdown = markdown.replace(there, here)
    return markdown
