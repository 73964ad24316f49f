import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from fastweights.hub import OnHub, ask_hub, is_hub_name


def not_found() -> RepositoryNotFoundError:
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "a.b_c-d"])
def test_names_that_the_hub_may_have(name):
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "a/", "two words", "a--b", "-a", "x" * 97, "é", "a\0b"])
def test_names_that_it_cannot_have(name):
    assert not is_hub_name(name)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (not_found(), "has no such dataset, or not for you"),
        (OfflineModeIsEnabled("offline"), "as HF_HUB_OFFLINE is set"),
        (ConnectionError("no network\nat all"), r"cannot be reached (no network)"),
    ],
)
def test_why_the_hub_gives_nothing_is_a_line(monkeypatch, error, reason):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fails)
    assert ask_hub("owner/name", "dataset").reason.endswith(reason)


def test_what_the_hub_has_it_gives(monkeypatch):
    about = huggingface_hub.ModelInfo(id="owner/name", siblings=[{"rfilename": "config.json"}])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: about)
    assert ask_hub("owner/name", "model") == OnHub(None, frozenset({"config.json"}))
