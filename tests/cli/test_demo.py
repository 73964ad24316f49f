import json
import pickle
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fastweights.cli.demo import _real, run_demo
from fastweights.cli.demo_smollm2 import Judged, RealModels, load_real
from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import PARTS
from fastweights.settings.demo import DemoConfig


class Here:
    """In the place of a process beside this one, which would know nothing of a package that a test has made."""

    def do(self, task, *args):
        future = Future()
        task, args = pickle.loads(pickle.dumps((task, args)))
        try:
            future.set_result(pickle.loads(pickle.dumps(task(*args))))
        except FastWeightsError as error:
            future.set_exception(error)
        return future

    def result(self, future, title):
        return future.result()


@contextmanager
def here(log):
    yield Here()


def test_a_process_that_ended_takes_nothing_else_with_it(monkeypatch):
    class Killed(Here):
        def result(self, future, title):
            if future is reading or everything:
                raise FastWeightsError(f"{title}: the process ended")
            return future.result()

    models = RealModels(None, None, None, None)
    monkeypatch.setattr("fastweights.cli.demo.load_real", lambda: models)
    monkeypatch.setattr("fastweights.cli.demo.answers", lambda models: {"smollm2": "Behind the door."})
    said = []
    reading, judging, everything = Future(), Future(), False
    judging.set_result({})
    loaded, real = _real(Killed(), judging, reading, said.append)
    assert loaded is models
    assert (real.judged, real.reading, real.files) == (Judged({}, {"smollm2": "Behind the door."}), None, [])
    assert real.plain()["reading"] is None
    assert said[-1] == "the long text is left out: the long text: the process ended"
    everything = True
    assert _real(Killed(), judging, reading, said.append) is None
    assert said[-1] == "it is left out: its parts: the process ended"


@pytest.mark.timeout(300)
def test_a_small_demo_writes_all_it_promises(tmp_path, shipped, monkeypatch):
    monkeypatch.setattr("fastweights.cli.demo.beside", here)
    load_real.cache_clear()
    said = []
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text("of another demo")
    config = DemoConfig(
        output=tmp_path / "demo",
        window=8,
        tokens=6144,
        contexts=(16, 64),
        held_out_tokens=1024,
        meta_steps=4,
        real_held_out_tokens=300,
        read_tokens=300,
    )
    with pytest.raises(FastWeightsError, match=r"has results\.json in it"):
        run_demo(config, said.append)
    config = replace(config, overwrite=True)
    result = run_demo(config, said.append)
    assert said
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(written["retention"]) == {"pure", "hybrid"}
    for name in ("pure", "hybrid"):
        losses = written["loss"][name]
        assert list(losses) == ["teacher", "converted", "finetune"]
        assert losses["finetune"] < losses["converted"]
        assert written["tokens"][name] == 6144
        costs = written["decode"][name]
        assert [cost["context"] for cost in costs] == [16, 64]
        assert costs[0]["state_bytes"] == costs[1]["state_bytes"]
        assert all(cost["ms_per_token"] > 0 for cost in costs)
    assert {name: list(found) for name, found in written["parts"].items()} == {"hybrid": ["all", *PARTS]}
    read = [(row["method"], row["context"]) for row in written["comparison"]]
    assert read == [("static", "block"), ("static", "stream"), ("sgd", "stream"), ("fwl", "stream")]
    assert all(
        row["evaluation"]["tokens"] == written["comparison"][0]["evaluation"]["tokens"] for row in written["comparison"]
    )
    teacher = written["decode"]["teacher"]
    assert teacher[1]["state_bytes"] == teacher[0]["state_bytes"] * 64 // 16
    assert list(written["smollm2"]["parts"]) == ["all", *PARTS]
    assert list(written["smollm2"]["samples"]) == ["smollm2-base", "untrained window", "smollm2"]
    assert tmp_path / "demo" / "manual.memory" in result.files
    for file in result.files:
        assert file.stat().st_size > 0
    assert {file.suffix for file in result.files} == {".png", ".json", ".memory"}
