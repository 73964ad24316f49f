import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.training import (
    FinetuneConfig,
    MetaConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
)
from fastweights.training.blocks import TokenBlocks
from fastweights.training.checkpoints import last_checkpoint
from fastweights.training.finetune import FinetuneTrainer
from fastweights.training.next_token import divergence, next_token_loss
from fastweights.training.runs import seconds_trained
from fastweights.training.transfer import TransferTrainer
from tests.conftest import make_gpt2, random_ids
from tests.forks import Forks


def trainer(folder, steps=4, run=None, kl_weight=0.0, **settings):
    teacher = make_gpt2()
    stage = FinetuneConfig(steps=steps, batch_size=2, kl_weight=kl_weight, **settings)
    blocks = TokenBlocks(random_ids(1, 640)[0], 32)
    return FinetuneTrainer(
        convert(teacher),
        teacher,
        stage,
        run or RunConfig(save_every=2, log_every=1),
        folder,
        blocks,
        byte_tokenizer(),
        title="t",
    )


def test_new_and_pretrained_parameters_have_their_own_learning_rates(tmp_path):
    stage = trainer(tmp_path, learning_rate=1e-4, new_learning_rate=1e-2, factor_learning_rate=1e-1, weight_decay=0.1)
    optimizer = stage.create_optimizer()
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    new = set(stage.model.new_parameter_names())
    for name, parameter in stage.model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert rate == (1e-1 if "_scale" in name else 1e-2 if name in new else 1e-4)
        assert decay == (0.1 if parameter.ndim > 1 and "ln_" not in name else 0.0)


def test_what_starts_as_the_identity_does_not_decay(tmp_path):
    """To 0, where it would let nothing through."""
    settings = ConversionConfig(rule="delta_and_average", feature_map="linear", value_map=True, conv_size=4)
    teacher, blocks = make_gpt2(), TokenBlocks(random_ids(1, 640)[0], 32)
    config, tokenizer = TransferConfig(steps=1, weight_decay=0.1), byte_tokenizer()
    stage = TransferTrainer(
        convert(teacher, settings), teacher, config, RunConfig(), tmp_path, blocks, tokenizer, title="t"
    )
    groups = stage.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in stage.model.named_parameters() if id(p) in decayed and ".0.attn." in name}
    matrices = ("c_attn", "c_proj", "rule.delta.decay.key_gate", "rule.delta.write_gate", "rule.average.key_gate")
    assert {name.split(".attn.")[1] for name in names} == {f"{name}.weight" for name in matrices}


@pytest.mark.parametrize(("kind", "heads"), [("finetune", 1), ("transfer", 0)])
def test_in_bf16_the_teacher_is_read_in_bf16_too(tmp_path, kind, heads):
    """Its matrices are most of what a step of LoRA multiplies by."""
    run, found = RunConfig(precision="bf16"), []
    if kind == "finetune":
        stage = trainer(tmp_path, steps=1, run=run, kl_weight=1.0)
    else:
        teacher, blocks = make_gpt2(), TokenBlocks(random_ids(1, 640)[0], 32)
        config, tokenizer = TransferConfig(steps=1, batch_size=2), byte_tokenizer()
        stage = TransferTrainer(convert(teacher), teacher, config, run, tmp_path, blocks, tokenizer, title="t")
    step = stage.compute_loss

    def watched(*args, **kwargs):
        for name, module in stage.teacher.named_modules():
            if name.endswith("c_fc") or name == "lm_head":
                module.register_forward_hook(lambda _, __, output: found.append(output.dtype))
        return step(*args, **kwargs)

    stage.compute_loss = watched
    stage.run(resume=False)
    assert found == [torch.bfloat16] * (3 + heads)


def test_the_loss_is_that_of_the_logits_of_both(tmp_path):
    stage = trainer(tmp_path, kl_weight=0.3)
    inputs = {name: torch.stack([stage.train_dataset[i][name] for i in (0, 1)]) for name in stage.train_dataset[0]}
    found = stage.compute_loss(stage.model, inputs)
    with torch.no_grad():
        student, teacher = (model(inputs["input_ids"]).logits for model in (stage.model, stage.teacher))
        expected = 0.7 * next_token_loss(student, inputs["labels"]) + 0.3 * divergence(student, teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_tokens_of_the_text_may_be_chosen_between(tmp_path):
    stage = trainer(tmp_path, kl_weight=1.0, vocabulary="seen")
    inputs = {name: torch.stack([stage.train_dataset[i][name] for i in (0, 1)]) for name in stage.train_dataset[0]}
    seen = sorted({token for block in stage.train_dataset for token in block["input_ids"].tolist()})
    assert 1 < len(seen) < 257
    found = stage.compute_loss(stage.model, inputs)
    with torch.no_grad():
        student, teacher = (model(inputs["input_ids"]).logits[..., seen] for model in (stage.model, stage.teacher))
    assert found.item() == pytest.approx(divergence(student, teacher).item(), rel=1e-5)


def test_training_lowers_the_loss(tmp_path):
    stage = trainer(tmp_path, steps=30, learning_rate=3e-3)
    stage.run(resume=False)
    losses = [entry["loss"] for entry in stage.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.json").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    stage = trainer(tmp_path, steps=10)
    compute = stage.compute_loss

    def poisoned(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss * float("nan") if stage.state.global_step == 5 else loss

    stage.compute_loss = poisoned
    with pytest.raises(FastWeightsError, match=r"stopped at step 6: the loss is nan; .*checkpoint-4"):
        stage.run(resume=False)
    weights = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    stage = trainer(tmp_path, steps=4)
    compute = stage.compute_loss

    def poisoned(model, *args, **kwargs):
        loss = compute(model, *args, **kwargs)
        if stage.state.global_step == 3:  # the last step before the second checkpoint
            stage.model.fast_attentions()[0].fast_scale.data.fill_(float("inf"))
        return loss

    stage.compute_loss = poisoned
    with pytest.raises(FastWeightsError, match=r"no longer finite; the last good checkpoint is .*checkpoint-2"):
        stage.run(resume=False)
    assert not (tmp_path / "checkpoint-4").exists()


def test_lora_without_the_model_it_is_an_adapter_of_is_refused_at_once():
    with pytest.raises(FastWeightsError, match="give that as teacher"):
        FinetuneTrainer(convert(make_gpt2()), None, FinetuneConfig(lora_rank=2, kl_weight=0.0))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: StageConfig(steps=0), "steps is 0"),
        (lambda: StageConfig(learning_rate=0), "learning_rate is 0"),
        (lambda: StageConfig(steps=5, warmup_steps=6), "warmup_steps is 6"),
        (lambda: FinetuneConfig(kl_weight=1.5), "kl_weight is 1.5"),
        (lambda: FinetuneConfig(vocabulary="some"), "vocabulary .some. is unknown"),
        (lambda: RunConfig(save_every=0), "save_every is 0"),
        (lambda: RunConfig(save_minutes=math.nan), "save_minutes is nan"),
        (lambda: RunConfig(max_grad_norm=math.nan), "max_grad_norm is nan"),
        (lambda: StageConfig(weight_decay=math.nan), "weight_decay is nan"),
        (lambda: StageConfig(weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: MetaConfig(base_learning_rate=math.inf), "base_learning_rate is inf"),
        (lambda: TrainConfig(resume=True, overwrite=True), "give one of them"),
    ],
)
def test_bad_settings(make, expected):
    with pytest.raises(FastWeightsError, match=expected):
        make()


def command(folder, model_folder, text_file, *options, batch_size=2):
    """A finetune run of 24 steps, for a process of its own."""
    return [
        *("train", "--stage", "all", "--model", str(model_folder)),
        *("--output", str(folder), "--data.text", str(text_file), "--data.block-size", "32"),
        *("--transfer.steps", "2", "--transfer.batch-size", str(batch_size), "--transfer.warmup-steps", "0"),
        *("--finetune.steps", "24", "--finetune.batch-size", str(batch_size), "--finetune.warmup-steps", "0"),
        *("--run.save-every", "4", "--run.log-every", "1", "--evaluation.max-tokens", "64"),
        *options,
    ]


def losses(folder):
    history = json.loads((folder / "finetune" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def forks():
    """Where processes begin."""
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder, text_file, forks):
    """That run, not disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    forks.run(*command(folder, model_folder, text_file)).check_returncode()
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, model_folder, text_file, forks, whole, how):
    killed = tmp_path / "killed"
    process = forks.start(*command(killed, model_folder, text_file))
    deadline = time.monotonic() + 120
    while not (killed / "finetune" / "checkpoint-8" / "manifest.json").exists():
        os.kill(process.pid, 0)  # it runs
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, how)
    done = process.wait()
    assert not (killed / "finetune" / "finished").exists()
    if how == signal.SIGTERM:
        assert done.returncode == 143
        assert "stopped by SIGTERM" in done.stderr.splitlines()[-1]
        assert "--resume goes on" in done.stderr.splitlines()[-1]
    forks.run(*command(killed, model_folder, text_file, "--resume")).check_returncode()
    assert losses(killed) == losses(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def told_to_stop(stage, at, number):
    """Has a signal come in the middle of a step."""
    compute = stage.compute_loss

    def told(*args, **kwargs):
        if stage.state.global_step == at:
            os.kill(os.getpid(), number)
        return compute(*args, **kwargs)

    stage.compute_loss = told


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_ends_the_step_and_saves(tmp_path, caplog, number, name):
    run = RunConfig(save_every=100, log_every=1)
    before = signal.getsignal(number)
    trainer(tmp_path / "whole", steps=6, run=run).run(resume=False)
    stage = trainer(tmp_path / "stopped", steps=6, run=run)
    told_to_stop(stage, at=2, number=number)
    with pytest.raises(SystemExit) as stop:
        stage.run(resume=False)
    assert stop.value.code == 128 + number
    assert last_checkpoint(tmp_path / "stopped").name == "checkpoint-3"
    assert len(caplog.messages) == 1
    assert f"stopped by {name} at step 3" in caplog.messages[0]
    assert signal.getsignal(number) is before
    seconds = stage.state.log_history[-1]["seconds"]
    resumed = trainer(tmp_path / "stopped", steps=6, run=run)
    resumed.run(resume=True)
    assert resumed.state.log_history[2]["seconds"] <= seconds
    rising = [entry["seconds"] for entry in resumed.state.log_history]
    assert rising == sorted(rising)
    assert seconds_trained(tmp_path / "stopped") == rising[-1] > rising[2]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    stage = trainer(tmp_path, steps=6)
    compute, steps = stage.compute_loss, []

    def impatient(*args, **kwargs):
        steps.append(stage.state.global_step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return compute(*args, **kwargs)

    stage.compute_loss = impatient
    with pytest.raises(KeyboardInterrupt):
        stage.run(resume=False)
    assert steps == [0]
    assert last_checkpoint(tmp_path) is None


def test_threads_leave_signals_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGTERM), []
    stage = trainer(tmp_path, steps=2)
    compute = stage.compute_loss

    def looked(*args, **kwargs):
        seen.append(signal.getsignal(signal.SIGTERM))
        return compute(*args, **kwargs)

    stage.compute_loss = looked
    thread = threading.Thread(target=lambda: stage.run(resume=False))
    thread.start()
    thread.join()
    assert (tmp_path / "finished").exists()
    assert seen == [before, before]


def test_two_processes_train_what_one_does(tmp_path, model_folder, text_file, whole):
    two = tmp_path / "two"
    half = command(two, model_folder, text_file, batch_size=1)
    # On a machine without GPUs --multi_gpu is accelerate's word for several processes, which then use gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, "-m", "fastweights", *half], check=True, capture_output=True, text=True)
    assert done.stdout.count("retention") == 2  # one table, whose title and head say it
    assert losses(two) == pytest.approx(losses(whole), rel=1e-3)
    first, second = load_file(whole / "model.safetensors"), load_file(two / "model.safetensors")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=1e-3)


def test_configs_are_plain_data():
    assert dataclasses.asdict(RunConfig())["seed"] == 0


def test_what_stands_around_the_attention_can_be_compiled(monkeypatch, tmp_path):
    """Of student and teacher, and to the same training; here by a compiler that takes no time."""
    plain = trainer(tmp_path / "plain", kl_weight=1.0)
    plain.run(resume=False)
    compiled, whole = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__) or whole(self, backend="eager")
    )
    other = trainer(tmp_path / "compiled", kl_weight=1.0, run=RunConfig(save_every=2, log_every=1, compile=True))
    assert sorted(compiled) == sorted(["GPT2MLP", "LayerNorm", "LayerNorm"] * 3 * 2)
    other.run(resume=False)
    for one, (name, expected) in zip(other.model.parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, expected, msg=name)
