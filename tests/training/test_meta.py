import json
import shutil
import signal

import pytest
import torch

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert, load_model
from fastweights.reading.stream import Stream
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.text import DataConfig
from fastweights.settings.training import MetaConfig, RunConfig, TrainConfig
from fastweights.training import train
from fastweights.training.blocks import TokenBlocks
from fastweights.training.meta import BlocksInRuns, MetaTrainer, RunSampler
from fastweights.training.next_token import next_token_loss
from tests.conftest import make_gemma3, make_gpt2, make_llama, random_ids
from tests.training.test_trainer import told_to_stop


def trainer(folder, model, documents=None, **settings):
    config = MetaConfig(**{"batch_size": 2, "steps": 4, "learning_rate": 1e-3, **settings})
    data = TokenBlocks(random_ids(1, 640)[0], 32, documents)
    run = RunConfig(save_every=2, log_every=1)
    return MetaTrainer(model, config, run, folder, data, byte_tokenizer(), title="meta")


def test_the_model_below_stays_frozen_unless_told_otherwise(tmp_path):
    for rate in (None, 1e-3):
        model = add_fast_weight_layer(make_gpt2())
        stage = trainer(tmp_path / str(rate), model, base_learning_rate=rate)
        stage.run(resume=False)
        same = all(
            torch.equal(a, b)
            for a, b in zip(model.model.base.parameters(), make_gpt2().transformer.parameters(), strict=True)
        )
        assert same == (rate is None)
        assert model.fast_weight_layer.output_scale.abs().min() > 0
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_scales_steps_and_decays_have_their_own_learning_rate(tmp_path):
    model = add_fast_weight_layer(make_gpt2())
    stage = trainer(tmp_path, model, learning_rate=1e-3, new_learning_rate=1e-1, base_learning_rate=1e-5)
    rates = {id(p): group["lr"] for group in stage.create_optimizer().param_groups for p in group["params"]}
    layer = model.fast_weight_layer
    for parameter in (layer.log_step_size, layer.decay_gate.bias, layer.output_scale, layer.norm_scale):
        assert rates[id(parameter)] == 1e-1
    assert rates[id(layer.up.weight)] == 1e-3
    assert rates[id(model.lm_head.weight)] == 1e-5


@pytest.mark.parametrize("lanes", [1, 3])
def test_runs_of_blocks_are_read_in_order_and_side_by_side(lanes):
    blocks = BlocksInRuns(TokenBlocks(torch.arange(500), 10), 8, lanes)
    sampler = RunSampler(50, blocks.run, lanes, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 50 // 8 // lanes * lanes * 8
    assert len(set(order)) == len(order)
    for lane in range(lanes):
        for i, block in enumerate(order[lane::lanes]):
            assert blocks[block]["ends"] == (i % 8 == 7)
            assert i % 8 == 0 or block == order[lane::lanes][i - 1] + 1
    read = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        read |= set(sampler)
    assert read == set(range(50 // 8 * 8))
    assert BlocksInRuns(TokenBlocks(torch.arange(500), 10), 8, 25).run == 2


@pytest.mark.parametrize("kind", ["softmax", "hybrid"])
def test_fast_weights_go_on_from_step_to_step(tmp_path, kind):
    base = make_gpt2() if kind == "softmax" else convert(make_gpt2(), ConversionConfig(window=4, positions="drop"))
    model = add_fast_weight_layer(base)
    with torch.no_grad():
        model.fast_weight_layer.output_scale.normal_()
    stage = trainer(tmp_path, model, steps=6, blocks=3, learning_rate=1e-12, new_learning_rate=1e-12)
    stage.run(resume=False)
    losses = [entry["loss"] for entry in stage.state.log_history if "loss" in entry]
    order, expected = list(stage._get_train_sampler()), []
    with torch.no_grad():
        for step in range(6):
            rows = [stage.train_dataset[i] for i in order[2 * step : 2 * step + 2]]
            if step % 3 == 0:
                stream = Stream(model, 32)
            ids = torch.stack([row["input_ids"] for row in rows])
            expected.append(next_token_loss(stream.read(ids), ids).item())
    assert losses == pytest.approx(expected, abs=1e-5)
    # One was due after steps 2 and 4, but within a run; the Trainer saves the last step in any case.
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
def test_documents_begin_within_the_blocks_of_a_stream(tmp_path, make):
    """Also under softmax layers with windows of their own, which go on from block to block as fast weights do."""
    model = add_fast_weight_layer(convert(make(), ConversionConfig(window=4)), FastWeightLayerSettings(segment=8))
    with torch.no_grad():
        model.fast_weight_layer.output_scale.normal_()
    lengths = [40, 7, 20, 3, 11, 50] * 5
    stage = trainer(tmp_path, model, lengths[:-1], steps=6, blocks=3, learning_rate=1e-12, new_learning_rate=1e-12)
    stage.run(resume=False)
    losses = [entry["loss"] for entry in stage.state.log_history if "loss" in entry]
    positions = torch.cat([torch.arange(n) for n in lengths])[:640]
    order, expected = list(stage._get_train_sampler()), []
    for run in (order[:6], order[6:12]):
        places = torch.stack([torch.arange(32 * run[lane], 32 * run[lane] + 96) for lane in range(2)])
        at = positions[places]
        at[:, :] -= at[:, :1] * (at == at[:, :1] + torch.arange(96))  # a document that began before begins here
        ids = random_ids(1, 640)[0][places]
        with torch.no_grad():
            logits = model(ids, position_ids=at).logits
        labels = ids.masked_fill(at == 0, -100)
        expected += [next_token_loss(logits[:, i : i + 32], labels[:, i : i + 32]).item() for i in (0, 32, 64)]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_ends_where_one_in_one_piece_does(tmp_path, monkeypatch):
    finals, steps = [], {"whole": 0, "resumed": 0}
    compute_loss = MetaTrainer.compute_loss
    for name in steps:
        folder = tmp_path / name
        stage = trainer(folder, add_fast_weight_layer(make_gpt2()), blocks=2)
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")

        def counted(*args, name=name, **kwargs):
            steps[name] += 1
            return compute_loss(*args, **kwargs)

        monkeypatch.setattr(MetaTrainer, "compute_loss", counted)
        stage.run(resume=True)
        finals.append(stage.model.state_dict())
    assert steps == {"whole": 4, "resumed": 2}
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_a_run_that_sigterm_stopped_ends_as_one_that_was_not(tmp_path):
    """The checkpoint waits for the end of a run of blocks: it has no place for fast weights."""
    finals = {}
    for name in ("whole", "stopped", "resumed"):
        folder = tmp_path / ("whole" if name == "whole" else "stopped")
        stage = trainer(folder, add_fast_weight_layer(make_gpt2()), steps=6, blocks=3)
        if name == "stopped":
            told_to_stop(stage, at=0, number=signal.SIGTERM)
            with pytest.raises(SystemExit):
                stage.run(resume=False)
            assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
        else:
            stage.run(resume=name == "resumed")
            finals[name] = (folder / "model.safetensors").read_bytes()
    assert finals["whole"] == finals["resumed"]


@pytest.mark.parametrize("kind", ["softmax", "hybrid"])
def test_the_meta_stage_gains_where_text_repeats_itself(tmp_path, kind):
    """Lines of a word that changes from document to document: only what was just read tells which."""
    texts = [json.dumps({"text": f"{word} " * 40}) for word in _words(150)]
    folder = tmp_path / "text"  # of its own: a run writes files into its output folder that look like text
    folder.mkdir()
    for split, rows in (("train", texts[:120]), ("test", texts[120:])):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    base = make_gpt2()
    if kind == "hybrid":
        base = convert(base, ConversionConfig(window=4, positions="drop"))
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    losses = {}
    for updates in (True, False):
        results = train(
            TrainConfig(
                model=str(tmp_path / "base"),
                output=tmp_path / f"updates {updates}",
                stage="meta",
                held_out="test",
                data=DataConfig(text=str(folder), block_size=64),
                fast_weight_layer=FastWeightLayerSettings(updates=updates),
                meta=MetaConfig(steps=60, batch_size=4, learning_rate=3e-3, new_learning_rate=5e-2),
                evaluation=HeldOutConfig(max_tokens=4000),
            )
        )
        assert [row.stage for row in results] == ["static", "meta", "meta, stream"]
        losses[updates] = [row.evaluation.loss for row in results]
    static, _, stream = losses[True]
    assert stream < losses[False][2] - 0.2 < static
    loaded = load_model(tmp_path / "updates True")
    assert loaded.fast_weight_layer is not None
    further = train(
        TrainConfig(
            model=str(tmp_path / "updates True"),
            output=tmp_path / "further",
            stage="meta",
            held_out="test",
            data=DataConfig(text=str(folder), block_size=64),
            meta=MetaConfig(steps=1),
            evaluation=HeldOutConfig(max_tokens=4000),
        )
    )
    assert [row.stage for row in further] == ["static", "meta", "meta, stream"]
    assert further[0].evaluation.loss == pytest.approx(static, abs=1e-5)
    assert load_model(tmp_path / "further").fast_weight_layer is not None


def test_bad_settings():
    with pytest.raises(FastWeightsError, match="blocks is 0"):
        MetaConfig(blocks=0)
    with pytest.raises(FastWeightsError, match="base_learning_rate"):
        MetaConfig(base_learning_rate=-1.0)


def _words(n: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (n, 5), generator=generator)
    return ["".join(map(chr, row.tolist())) for row in letters]
