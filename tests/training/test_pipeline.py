"""What a run says of the model that it made."""

import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from fastweights.data import load_documents, overlap, tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import PARTS, evaluate_parts
from fastweights.evaluation.perplexity import evaluate
from fastweights.models import convert, load_model
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.conversion import add_mix_gates
from fastweights.models.decoding import set_fast_decoding
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import EvaluationConfig, HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, RunConfig, TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.pipeline import _without_the_end
from tests.conftest import make_llama, random_ids


@pytest.fixture
def config(tmp_path, model_folder, text_file):
    return TrainConfig(
        model=str(model_folder),
        output=tmp_path / "run",
        convert=ConversionConfig(window=8),
        data=DataConfig(text=str(text_file), block_size=32),
        transfer=TransferConfig(steps=2),
        finetune=FinetuneConfig(steps=2),
        evaluation=HeldOutConfig(max_tokens=400, parts_tokens=200),
    )


def test_the_last_result_of_a_hybrid_run_has_its_parts(config):
    results = train(config)
    assert [bool(result.parts) for result in results] == [False, False, False, True]
    written = json.loads((config.output / "results.json").read_text())
    assert written[-1]["parts"]["window alone"]["loss"] == results[-1].parts["window alone"].loss
    tokenizer = load_tokenizer(config.model)
    held_out = tokenize(_without_the_end(load_documents(config.data))[1], tokenizer)
    expected = evaluate_parts(
        load_model(config.output),
        load_model(config.model),
        held_out,
        block_size=32,
        config=EvaluationConfig(max_tokens=200),
    )
    assert list(results[-1].parts) == ["all", *PARTS]
    for name, part in results[-1].parts.items():
        assert part.tokens == 199
        assert part.loss == pytest.approx(expected[name].loss, rel=1e-5)
    resumed = train(replace(config, resume=True))
    assert resumed[-1].parts == results[-1].parts
    few = train(replace(config, resume=True, evaluation=HeldOutConfig(max_tokens=100, parts_tokens=200)))
    assert few[-1].parts["all"] == few[-1].evaluation


def test_other_runs_have_none(config):
    for changed in (
        replace(config, convert=ConversionConfig()),
        replace(config, evaluation=replace(config.evaluation, parts_tokens=0), overwrite=True),
    ):
        assert all(result.parts is None for result in train(changed))


def with_lora(config, rank=2, **changes):
    stages = {name: replace(getattr(config, name), lora_rank=rank) for name in ("transfer", "finetune")}
    return replace(config, **stages, **changes)


def test_a_run_with_lora_leaves_an_adapter(config):
    """Through both stages, and the same when it is resumed after the first."""
    results = train(with_lora(config))
    files = {file.name for file in config.output.iterdir() if file.is_file()} - {".fastweights.lock"}
    assert sorted(files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "results.json",
        "run.json",
    ]
    adapter = json.loads((config.output / "adapter_config.json").read_text())
    assert (adapter["r"], len(adapter["target_modules"])) == (2, 3 * 2)
    model, teacher = load_model(config.output), load_model(config.model)
    assert torch.equal(model.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    held_out = tokenize(_without_the_end(load_documents(config.data))[1], load_tokenizer(config.model))
    merged = evaluate(model, held_out, block_size=32, config=EvaluationConfig(max_tokens=400))
    assert merged.loss == pytest.approx(results[-1].evaluation.loss, rel=1e-4)
    shutil.rmtree(config.output / "finetune")
    resumed = train(with_lora(config, resume=True))
    assert resumed[-1].evaluation.loss == pytest.approx(results[-1].evaluation.loss, rel=1e-5)


def test_an_adapter_is_trained_on(config, tmp_path):
    train(with_lora(config))
    further = replace(
        with_lora(config),
        model=str(config.output),
        convert=ConversionConfig(),
        stage="finetune",
        transfer=TransferConfig(),
    )
    results = train(replace(further, output=tmp_path / "further"))
    assert [result.stage for result in results] == ["teacher", "finetune"]
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (config.output, tmp_path / "further")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    with pytest.raises(FastWeightsError, match="lora_rank is 3, and the adapter to train on has 2"):
        train(replace(further, output=tmp_path / "other", finetune=replace(further.finetune, lora_rank=3)))
    whole = train(replace(further, output=tmp_path / "whole", finetune=config.finetune))
    assert whole[-1].stage == "finetune"
    assert (tmp_path / "whole" / "config.json").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_trained_on_may_get_gates_on_its_mix(config, tmp_path, rank):
    config = with_lora(config, rank)
    train(config)
    further = replace(
        config,
        model=str(config.output),
        teacher=config.model,
        output=tmp_path / "further",
        convert=ConversionConfig(mix_gate=True),
        stage="finetune",
        transfer=TransferConfig(),
    )
    train(further)
    file = "adapter_model.safetensors" if rank else "model.safetensors"
    before, after = (load_file(folder / file).keys() for folder in (config.output, further.output))
    added = {name.split("self_attn.")[-1].split("attn.")[-1] for name in after - before}
    assert added == {"mix_gate.gate.weight", "mix_gate.gate.bias", "mix_gate.share"}
    assert before <= after
    model = load_model(further.output)
    assert model.config.settings.mix_gate
    assert all(layer.mix_gate.gate.weight.any() for layer in model.fast_attentions())
    train(replace(further, resume=True))
    again = replace(further, convert=ConversionConfig(mix_gate=True, value_map=True), overwrite=True)
    with pytest.raises(FastWeightsError, match=r"converted already: convert.mix_gate alone can be added"):
        train(again)


@torch.no_grad()
def test_gates_on_the_mix_change_nothing_at_first_and_are_not_made_anew():
    model, ids = convert(make_llama(), ConversionConfig(window=4)).eval(), random_ids(1, 20)
    expected = model.generate(ids, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    add_mix_gates(model)
    assert model(ids).logits.equal(convert(make_llama(), ConversionConfig(window=4))(ids).logits)
    assert FastWeightsConfig(**model.config.to_dict()).settings.mix_gate
    gates = [layer.mix_gate for layer in model.fast_attentions()]
    for gate in gates:
        gate.gate.weight.normal_()
        gate.share.normal_()
    add_mix_gates(model)
    assert [layer.mix_gate for layer in model.fast_attentions()] == gates
    found = model.generate(ids, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    assert not torch.stack(found.logits).allclose(torch.stack(expected.logits), rtol=1e-3)
    set_fast_decoding(False)
    try:
        plain = model.generate(ids, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    finally:
        set_fast_decoding(True)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(found.logits), rtol=1e-3, atol=1e-4)


def test_there_must_be_fast_weights_for_a_gate(config, tmp_path, model_folder):
    convert(model_folder, ConversionConfig(layers="none")).save_pretrained(tmp_path / "none")
    load_tokenizer(str(model_folder)).save_pretrained(tmp_path / "none")
    changed = replace(config, model=str(tmp_path / "none"), stage="finetune", transfer=TransferConfig())
    with pytest.raises(FastWeightsError, match="it has no fast weights"):
        train(replace(changed, convert=ConversionConfig(mix_gate=True)))


def test_an_adapter_may_take_the_place_of_a_model(config):
    """In a run's own folder and its stages', which it starts anew; and the other way round."""
    train(config)
    (config.output / "tokenizer.json").touch()
    results = train(with_lora(config, overwrite=True))
    for folder in (config.output, config.output / "transfer", config.output / "finetune"):
        assert (folder / "adapter_config.json").exists()
        assert not (folder / "config.json").exists()
    held_out = tokenize(_without_the_end(load_documents(config.data))[1], load_tokenizer(config.model))
    merged = evaluate(load_model(config.output), held_out, block_size=32, config=EvaluationConfig(max_tokens=400))
    assert merged.loss == pytest.approx(results[-1].evaluation.loss, rel=1e-4)
    train(replace(config, overwrite=True))
    assert not (config.output / "adapter_config.json").exists()
    load_model(config.output)


def test_lora_on_what_no_adapter_could_be_of_is_refused_before_it_is_trained(config, tmp_path):
    train(config)  # all weights
    further = replace(
        with_lora(config),
        model=str(config.output),
        output=tmp_path / "further",
        convert=ConversionConfig(),
        stage="finetune",
        transfer=TransferConfig(),
    )
    with pytest.raises(FastWeightsError, match=r"is not as in the base model .*: leave lora_rank out, or train the"):
        train(further)
    assert not further.output.exists()


def test_what_cannot_be_trained_leaves_an_earlier_run_as_it_is(config, tmp_path):
    train(with_lora(config, run=RunConfig(save_every=1)))
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    again = replace(config, overwrite=True, stage="finetune", transfer=TransferConfig())
    pure = replace(again, convert=ConversionConfig(rule="average"), finetune=FinetuneConfig(fast_weights=False))
    with pytest.raises(FastWeightsError, match="no window that could be trained alone"):
        train(pure)
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before


def test_a_trained_model_says_of_its_use_of_a_cache_what_the_original_says(config):
    train(config)
    assert load_model(config.model).config.use_cache
    assert load_model(config.output).config.use_cache
    assert load_model(config.output / "finetune").config.use_cache


def test_a_run_goes_on_with_the_conversion_that_it_began_with(config, tmp_path):
    """Its weights do not tell how long its window is."""
    converted = tmp_path / "converted"
    convert(config.model, ConversionConfig(window=8)).save_pretrained(converted)
    load_tokenizer(config.model).save_pretrained(converted)
    config = replace(config, model=str(converted), convert=ConversionConfig())
    train(config)
    train(replace(config, resume=True))
    convert(load_model(converted).config.base_model, ConversionConfig(window=16)).save_pretrained(converted)
    with pytest.raises(FastWeightsError, match="the converted model is not what it was"):
        train(replace(config, resume=True))
    run = json.loads((config.output / "run.json").read_text())
    del run["contents"]["converted model"]  # as in runs from before
    (config.output / "run.json").write_text(json.dumps(run))
    train(replace(config, resume=True))


@pytest.mark.parametrize("text", ["", "{", '{"words": "a"}\n'], ids=["empty", "cut off", "another column"])
def test_a_validation_split_that_cannot_be_read_is_no_reason_to_take_another(config, tmp_path, text):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one bottle of beer on the wall, one bottle of beer."}\n' * 90)
    config = replace(config, data=replace(config.data, text=str(folder)))
    train(config)  # the last twentieth is held out
    (folder / "validation.jsonl").write_text(text)
    with pytest.raises(FastWeightsError, match=r"validation|column"):
        train(replace(config, overwrite=True))


@pytest.mark.parametrize(
    ("split", "held_out", "shared"),
    [
        ("train", "validation", False),
        ("train", "train", True),
        ("train+validation", "validation", True),
        ("train + validation[:5]", "validation", True),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:5%]", "train[:5%]", True),
        ("all", "test", True),
    ],
)
def test_splits_of_which_one_is_part_of_the_other_overlap(split, held_out, shared):
    assert overlap(held_out, split) is shared


def test_a_killed_stage_with_lora_goes_on(config):
    """From a checkpoint, to the same weights."""
    config = with_lora(config, run=RunConfig(save_every=1))
    train(config)
    expected = load_file(config.output / "adapter_model.safetensors")
    finetune = config.output / "finetune"
    for name in ("adapter_config.json", "adapter_model.safetensors", "finished"):
        (finetune / name).unlink()
    shutil.rmtree(finetune / "checkpoint-2")
    train(replace(config, resume=True))
    found = load_file(config.output / "adapter_model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_lora_leaves_out_what_the_base_model_has(config):
    train(with_lora(config, run=RunConfig(save_every=1)))
    names = load_file(config.output / "finetune" / "checkpoint-2" / "model.safetensors").keys()
    assert names
    new = {f"{name}" for name in convert(config.model, config.convert).new_tensors()}
    assert {name for name in names if "lora_" not in name} == new


@pytest.mark.parametrize("rank", [0, 2])
def test_activation_checkpointing_computes_each_layer_twice_and_trains_the_same(config, rank, monkeypatch):
    calls = []
    forward = GPT2MLP.forward

    def counted(self, *args, **kwargs):
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    found, counts = {}, {}
    for on in (False, True):
        calls.clear()
        run = RunConfig(activation_checkpointing=on)
        changed = replace(config, stage="finetune", transfer=TransferConfig(), output=config.output / str(on), run=run)
        train(replace(changed, finetune=replace(config.finetune, lora_rank=rank)))
        counts[on] = sum(calls)
        found[on] = load_file(next((config.output / str(on)).glob("*model.safetensors")))
    assert counts[True] == 2 * counts[False] > 0
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, rtol=1e-4, atol=1e-5)
    for stage in ("meta", "transfer"):
        with pytest.raises(FastWeightsError, match=f"stage {stage} has no use for it"):
            TrainConfig(stage=stage, run=RunConfig(activation_checkpointing=True))


def test_what_was_evaluated_before_a_resume_is_not_evaluated_again(config, monkeypatch):
    config = replace(config, run=RunConfig(save_every=1))
    results = train(config)
    finetune, evaluated = config.output / "finetune", []
    for name in ("config.json", "model.safetensors", "finished"):
        (finetune / name).unlink()
    monkeypatch.setattr(
        "fastweights.training.pipeline.evaluate",
        lambda model, *args, **more: evaluated.append(evaluate(model, *args, **more)) or evaluated[-1],
    )
    again = train(replace(config, resume=True))
    assert [row.stage for row in again] == [row.stage for row in results]
    assert [row.evaluation for row in again[:2]] == [row.evaluation for row in results[:2]]
    assert again[-1].evaluation.loss == pytest.approx(results[-1].evaluation.loss, rel=1e-5)
    assert len(evaluated) == 2  # after each stage
    evaluated.clear()
    train(replace(config, resume=True, evaluation=HeldOutConfig(max_tokens=300, parts_tokens=0)))
    assert len(evaluated) == 4  # in another way, all of them


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_what_another_run_evaluated_is_not_taken_for_this_ones(config, how):
    """Not even if this one ends before it has evaluated anything."""
    train(config)
    changed = HeldOutConfig(max_tokens=100, parts_tokens=0)
    if how == "resume":
        begun = replace(config, resume=True, evaluation=changed)
    else:
        begun = replace(config, overwrite=True, convert=ConversionConfig(window=4), evaluation=changed)

    interrupted = patch("fastweights.training.pipeline.evaluate", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        train(begun)
    results = train(replace(begun, overwrite=False, resume=True))
    assert [row.evaluation.tokens for row in results] == [99] * 4


def test_one_rank_for_both_stages(config):
    with pytest.raises(FastWeightsError, match=r"transfer.lora_rank 2 and finetune.lora_rank 0 were given"):
        replace(config, transfer=TransferConfig(lora_rank=2))
    with pytest.raises(FastWeightsError, match=r"finetune.fast_weights is off and stage is all"):
        replace(config, stage="all", finetune=FinetuneConfig(fast_weights=False))


def test_attention_alone_is_trained(config):
    train(replace(config, finetune=replace(config.finetune, weights="attention")))
    trained, teacher = (dict(load_model(source).named_parameters()) for source in (config.output, config.model))
    base = {name.replace("transformer.", "model.base."): parameter for name, parameter in teacher.items()}
    moved = {name for name, parameter in base.items() if not torch.equal(trained[name], parameter)}
    assert moved
    assert all(".attn." in name for name in moved)


def test_divergence_from_the_first_step_needs_no_other_stage(config):
    alone = replace(config, stage="finetune", transfer=TransferConfig())
    results = train(alone)
    assert [result.stage for result in results] == ["teacher", "converted", "finetune"]
    with pytest.raises(FastWeightsError, match="has no fast weights to finetune: say how to convert it"):
        train(replace(alone, convert=ConversionConfig(), output=config.output / "other"))


@pytest.mark.parametrize("rank", [0, 2])
def test_windows_trained_alone_are_the_control(config, rank):
    config = replace(config, convert=replace(config.convert, feature_map="linear", value_map=True))
    finetune = replace(config.finetune, fast_weights=False, lora_rank=rank)
    config = replace(config, stage="finetune", transfer=TransferConfig(), finetune=finetune)
    before = train(config)[1].evaluation.loss
    trained = load_model(config.output)
    assert all(not layer.fast_scale.any() for layer in trained.fast_attentions())
    assert any((layer.window_scale != 1).any() for layer in trained.fast_attentions())
    for layer in trained.fast_attentions():
        for heads in (layer.query_map, layer.key_map, layer.value_map):
            assert heads.weight.equal(torch.eye(layer.head_dim).expand_as(heads.weight))
    result = json.loads((config.output / "results.json").read_text())[-1]
    assert result["parts"]["window alone"]["loss"] == result["parts"]["all"]["loss"] != before
    with pytest.raises(FastWeightsError, match="layer 0 has no window that could be trained alone"):
        train(replace(config, output=config.output / "pure", convert=ConversionConfig(positions="drop")))
