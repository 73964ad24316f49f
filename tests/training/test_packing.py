"""Documents that share a block know nothing of each other, in every stage of training."""

import pytest
import torch

from fastweights.embedded import byte_tokenizer
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.training import FinetuneConfig, MetaConfig, RunConfig, StageConfig, TransferConfig
from fastweights.training.blocks import TokenBlocks, positions_if_packed
from fastweights.training.finetune import FinetuneTrainer
from fastweights.training.meta import MetaTrainer, stream_positions
from fastweights.training.next_token import next_token_loss
from fastweights.training.pretrain_trainer import PretrainTrainer
from fastweights.training.teacher import record_attention
from fastweights.training.transfer import TransferTrainer
from tests.conftest import make_gpt2, make_llama, random_ids

LENGTHS = (20, 30, 14)  # in two blocks of 32: a document starts at 0 and 20, and at 18 of the second


def blocks() -> TokenBlocks:
    return TokenBlocks(random_ids(1, sum(LENGTHS))[0], 32, LENGTHS)


@torch.no_grad()
def test_a_softmax_model_reads_each_document_of_a_block_as_if_alone(base):
    block = blocks()[0]
    packed = base(input_ids=block["input_ids"][None], position_ids=block["position_ids"][None], use_cache=False).logits
    for part in (slice(0, 20), slice(20, 32)):
        alone = base(input_ids=block["input_ids"][None, part], use_cache=False).logits
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["keep", "drop"])
def test_the_teachers_records_are_those_of_each_document_alone(base, positions):
    block = blocks()[0]
    ids, places = block["input_ids"][None], block["position_ids"][None]
    packed = record_attention(base, ids, places, positions=positions)
    for part in (slice(0, 20), slice(20, 32)):
        for record, alone in zip(packed, record_attention(base, ids[:, part], positions=positions), strict=True):
            for name in ("inputs", "output", "teacher_inputs"):
                torch.testing.assert_close(
                    getattr(record, name)[:, part], getattr(alone, name), rtol=1e-4, atol=1e-4, msg=name
                )


def test_the_first_token_of_a_document_is_not_predicted():
    block = blocks()[0]
    logits = torch.randn(1, 32, 257, requires_grad=True)
    next_token_loss(logits, block["labels"][None]).backward()
    silent = logits.grad[0].abs().sum(-1) == 0
    assert silent.nonzero().flatten().tolist() == [19, 31]
    assert next_token_loss(logits, torch.full((1, 32), -100)).item() == 0


def seen_by(model) -> list[torch.Tensor | None]:
    """The positions that a model is given, call by call."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs.get("position_ids"))

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def arguments(folder, data):
    return RunConfig(), folder, data, byte_tokenizer()


@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["packed", "one document"])
def test_student_and_teacher_are_told(tmp_path, lengths):
    teacher = make_gpt2()
    data = TokenBlocks(blocks().blocks.flatten(), 32, lengths)
    makers = {
        "finetune": lambda folder: FinetuneTrainer(
            convert(teacher), teacher, FinetuneConfig(steps=1, batch_size=2), *arguments(folder, data), title="t"
        ),
        "transfer": lambda folder: TransferTrainer(
            convert(teacher), teacher, TransferConfig(steps=1, batch_size=2), *arguments(folder, data), title="t"
        ),
    }
    for name, make in makers.items():
        trainer = make(tmp_path / name)
        student_saw, teacher_saw = seen_by(trainer.model), seen_by(teacher.base_model)
        trainer.run(resume=False)
        expected = None if lengths is None else sorted(item["position_ids"].tolist() for item in data)
        for seen in (student_saw[-1], teacher_saw[-1]):
            assert (seen if seen is None else sorted(seen.tolist())) == expected


def test_documents_within_a_block_are_pretrained_from_their_first_position(tmp_path):
    model, data = make_gpt2(), blocks()
    trainer = PretrainTrainer(model, StageConfig(steps=1, batch_size=2), *arguments(tmp_path, data), title="t")
    seen = seen_by(model)
    trainer.run(resume=False)
    rows = {20: None, 18: None}
    for row in seen[-1]:
        start = int((row == 0).nonzero()[-1])  # of the second document
        rows[start] = row
        assert row[start:].tolist() == list(range(32 - start))
        assert row[:start].diff().eq(1).all()
    assert all(row is not None for row in rows.values())
    assert any(row[0] > 0 for row in rows.values())


def test_positions_of_a_stream():
    """Rows: goes on; goes on, then starts anew; starts anew at once."""
    places = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]])
    begins, following = torch.tensor([False, False, True]), torch.tensor([8, 3, 8])
    expected = [[8, 9, 10, 11], [3, 4, 0, 1], [0, 1, 2, 3]]
    assert stream_positions(places, begins, following).tolist() == expected


@pytest.mark.parametrize("lengths", [(40, 20, 36), (32, 64)], ids=["inside", "at the start"])
def test_a_stream_in_training_starts_anew_with_a_document(tmp_path, lengths):
    base = convert(make_gpt2(), ConversionConfig(positions="drop"))
    model = add_fast_weight_layer(base, FastWeightLayerSettings())
    data = TokenBlocks(random_ids(1, 96)[0], 32, lengths)
    config = MetaConfig(steps=3, batch_size=1, blocks=3)
    trainer = MetaTrainer(model, config, *arguments(tmp_path, data), title="t")
    seen, streams = seen_by(model), []
    compute = trainer.compute_loss

    def watched(*args, **kwargs):
        loss = compute(*args, **kwargs)
        streams.append(trainer._stream)
        return loss

    trainer.compute_loss = watched
    trainer.run(resume=False)
    if lengths == (32, 64):  # the second block begins with a document: nothing to tell, but nothing is carried either
        assert seen == [None, None, None]
        assert streams[0] is not streams[1]
    else:
        assert seen[0] is None
        assert seen[1].tolist() == [[*range(32, 40), *range(20), *range(4)]]
        assert seen[2].tolist() == [list(range(4, 36))]
        assert streams[0] is streams[1]
    assert streams[2] is None  # the run of blocks is at its end


def test_positions_are_left_to_the_model_where_no_document_starts_inside():
    assert positions_if_packed(torch.arange(4)[None]) is None
    places = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    assert positions_if_packed(places) is places


@torch.no_grad()
def test_a_student_is_measured_on_each_document_by_itself():
    teacher, lengths = make_llama(), (11, 9)
    student = convert(teacher, ConversionConfig(window=4))
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = record_attention(teacher, ids, positions)
    found = student.reproduction_errors(packed, positions)
    expected = torch.zeros_like(found)
    for part in ids.split(lengths, 1):
        alone = [
            record._replace(variance=whole.variance)
            for record, whole in zip(record_attention(teacher, part), packed, strict=True)
        ]
        expected += student.reproduction_errors(alone) * part.shape[1] / sum(lengths)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (student.reproduction_errors(packed) - expected).abs().min() > 1e-3
