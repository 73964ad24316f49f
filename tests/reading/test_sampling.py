"""Texts sampled from a model are draws from its own distribution, whatever they are sampled beside."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from fastweights import FastWeightsError, SamplingConfig, convert, sample
from fastweights.data import tokenize
from fastweights.embedded import byte_tokenizer
from fastweights.models.loading import load_model, load_tokenizer
from fastweights.reading import sampling
from fastweights.reading.memory import fingerprint
from fastweights.reading.sampled_text import name_of_run
from fastweights.reading.sampling import draw
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama

END = 256


def ends_sometimes(model):
    """A document of some ten tokens, so that most leave their batch early."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(head.weight.detach().new_zeros(len(head.weight)))
    head.bias.data[END] = 4.0
    return model


def documents(model, *, prompts=(), tokenizer=None, **settings):
    config = SamplingConfig(**{"tokens": 600, "length": 40, "batch_size": 16, **settings})
    tokenizer = tokenizer or byte_tokenizer()
    return [document for batch in sample(model, tokenizer, config, prompts=prompts) for document in batch]


MODELS = {
    "softmax": make_llama,
    "absolute positions": make_gpt2,
    "pure": lambda: convert(make_llama(), ConversionConfig()),
    "hybrid": lambda: convert(make_llama(), ConversionConfig(window=8)),
}


def note_draws(monkeypatch) -> dict[float, tuple]:
    """What tokens are drawn from, and which, by their random numbers."""
    seen = {}

    def noted(logits, uniform):
        drawn = draw(logits, uniform)
        for row, token, number in zip(logits, drawn, uniform, strict=True):
            seen[float(number)] = (row, int(token))
        return drawn

    monkeypatch.setattr(sampling, "draw", noted)
    return seen


def check_draws(model, sampler, number: int, start: list[int], ids: list[int], seen: dict[float, tuple]):
    """A check that the token at a place was drawn from what the whole text before it gives."""
    with torch.no_grad():
        logits = model(torch.tensor([[*start, *ids]])).logits[0].float()
    uniform = sampler._uniform(range(number, number + 1))[0]

    def check(place: int) -> None:
        row, token = seen[float(uniform[place])]
        assert token == ids[place]
        assert torch.allclose(row, logits[len(start) + place - 1], atol=1e-4)

    return check


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_token_is_the_one_that_the_whole_text_before_it_gives(make, monkeypatch):
    model, seen = ends_sometimes(make().double()), note_draws(monkeypatch)
    sampler = sampling._Sampler(
        model, byte_tokenizer(), SamplingConfig(tokens=640, length=40, batch_size=16), ["ab", ""]
    )
    batch = sampler._batch(5, lambda tokens: None)
    lengths = {len(ids) for ids in batch}
    assert len(lengths) > 3  # so that rows left the batch, some of them while others began
    for number, ids in enumerate(batch, 5):
        begun = 2 if number % 2 == 0 else 0
        assert ids[:begun] == [97, 98][:begun]
        check = check_draws(model, sampler, number, [END], ids, seen)
        for place in range(begun, len(ids)):
            check(place)
        assert END not in ids[:-1]
        assert ids[-1] == END or len(ids) == 40


def test_a_document_is_the_same_whatever_it_is_sampled_beside(base):
    model = ends_sometimes(base.double())
    many, few = documents(model), documents(model, batch_size=3)
    assert [document.text for document in few] == [document.text for document in many][: len(few)]
    assert len({document.text for document in many}) > len(many) // 2
    assert documents(model, seed=1)[0] != many[0]


def test_going_on_gives_what_was_still_to_come():
    model = ends_sometimes(make_llama())
    config = SamplingConfig(tokens=600, length=40, batch_size=8)
    batches = list(sample(model, byte_tokenizer(), config))
    assert len(batches) > 2
    first = batches[0]
    tokens = sum(document.tokens for document in first)
    assert list(sample(model, byte_tokenizer(), config, documents=len(first), tokens=tokens)) == batches[1:]


def test_prompts_begin_documents_in_turn():
    for number, document in enumerate(documents(make_llama(), prompts=["a b", "xyz"], tokens=200)):
        assert document.text.startswith(("a b", "xyz")[number % 2])
        assert document.tokens <= 40


TURNS = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}a:{% endif %}"


def with_template(template: str | None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("prompts", [(), ("hello", "you")])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_conversations_are_the_models_own_between_what_the_template_has(make, prompts, monkeypatch):
    model, seen, turns = ends_sometimes(make().double()), note_draws(monkeypatch), set()
    config = SamplingConfig(length=40, batch_size=8, conversations=True)
    sampler = sampling._Sampler(model, with_template(TURNS), config, prompts)
    for number, ids in enumerate(sampler._batch(0, lambda tokens: None)):
        begun = [*f"u:{prompts[number % 2]}".encode(), END, *b"a:"] if prompts else [*b"u:"]
        assert ids[: len(begun)] == begun
        assert len(ids) == 40  # none ends before
        check = check_draws(model, sampler, number, [], ids, seen)
        role, place = "a" if prompts else "u", len(begun)
        while place < len(ids):
            check(place)
            if ids[place] == END:
                role = {"u": "a", "a": "u"}[role]
                given = [*f"{role}:".encode()]
                assert ids[place + 1 : place + 3] == given[: len(ids) - place - 1]
                place += 2
            place += 1
        turns.add(ids.count(END))
    assert len(turns) > 2


def test_conversations_are_the_same_whatever_they_are_sampled_beside():
    model, tokenizer = ends_sometimes(make_llama().double()), with_template(TURNS)
    settings = {"tokenizer": tokenizer, "tokens": 320, "conversations": True}
    many, few = (documents(model, batch_size=rows, **settings) for rows in (8, 3))
    assert many == few[:8]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "by no token of its own"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "by no token of its own"),
        ("{{ raise_exception('never') }}", "takes no such conversation"),
    ],
)
def test_conversations_need_a_template_that_marks_turns(template, said):
    with pytest.raises(FastWeightsError, match=said):
        sample(make_llama(), with_template(template), SamplingConfig(conversations=True))


def test_files_from_before_there_were_conversations_go_on():
    model = make_llama()
    old = {"length": None, "batch_size": 64, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
    old["precision"] = "fp32"
    said = json.dumps([fingerprint(model), old, ["a"]])
    assert name_of_run(model, SamplingConfig(), ["a"]) == hashlib.sha256(said.encode()).hexdigest()[:10]
    assert name_of_run(model, SamplingConfig(conversations=True), ["a"]) != name_of_run(model, SamplingConfig(), ["a"])


def test_what_is_drawn_has_the_probabilities_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1000, generator=generator).mul(2)
    logits[:, ::3] = -math.inf
    n = 200_000
    drawn = draw(logits, torch.tensor([0.0]).double())
    assert logits[0, drawn].isfinite().all()
    count = torch.zeros(1000)
    for numbers in torch.rand(n, generator=generator, dtype=torch.float64).split(10_000):
        count += draw(logits.expand(len(numbers), -1), numbers).bincount(minlength=1000)
    expected = logits[0].softmax(-1) * n
    likely = expected > 20
    assert count[::3].sum() == 0
    deviation = ((count - expected) / expected.sqrt())[likely]
    assert deviation.abs().max() < 5
    assert 0.8 < deviation.square().mean() < 1.2


def test_the_ends_of_the_unit_interval_draw_what_is_possible():
    logits = torch.full((2, 600), -math.inf)
    logits[:, 300] = 0.0
    for number in (0.0, math.nextafter(1, 0)):
        assert draw(logits, torch.tensor([number, number]).double()).tolist() == [300, 300]


@pytest.mark.parametrize(
    ("settings", "allowed"), [({"top_k": 1}, 1), ({"top_p": 1e-6}, 1), ({"temperature": 0.01, "top_k": 3}, 3)]
)
def test_fewer_tokens_to_sample_from(settings, allowed):
    model = make_gpt2()
    texts = {document.text for document in documents(model, tokens=16 * 3, length=3, **settings)}
    assert len(texts) <= allowed**3
    assert len({document.text for document in documents(model, tokens=16 * 3, length=3)}) > allowed**3 // 2


def test_a_text_that_is_not_its_tokens_again_is_told():
    found = documents(ends_sometimes(make_llama()))  # random bytes, hardly ever UTF-8
    for document in found:
        length = len(tokenize([document.text], byte_tokenizer()).tokens) - 1 if document.text else 0
        assert document.comes_back == ("\ufffd" not in document.text)
        assert not document.comes_back or document.tokens - length in (0, 1)
    assert {document.comes_back for document in found} == {True, False}


def test_few_tokens_are_not_sampled_by_the_dozen():
    assert len(documents(make_llama(), tokens=30, length=40, batch_size=64)) <= 2


@pytest.mark.parametrize(
    ("make", "settings", "prompts", "said"),
    [
        (make_gpt2, {"length": 129}, [], "absolute positions end at 128"),
        (make_llama, {"length": 4}, ["abcd"], "the prompt 'abcd' has 4 tokens"),
    ],
)
def test_what_has_no_room_is_refused(make, settings, prompts, said):
    with pytest.raises(FastWeightsError, match=said):
        documents(make(), prompts=prompts, **settings)


def test_a_model_without_a_start_token_needs_prompts():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    config = SamplingConfig(tokens=20, length=10)
    with pytest.raises(FastWeightsError, match="no token to begin a text with"):
        sample(make_llama(), tokenizer, config)
    assert next(sample(make_llama(), tokenizer, config, prompts=["a"]))[0].text.startswith("a")


def test_a_model_that_predicts_nothing_is_refused():
    model = make_llama()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FastWeightsError, match="not finite"):
        documents(model)


def test_the_length_is_the_models_context_unless_that_is_long():
    for context, length in ((128, 128), (4096, 1024)):
        model = make_llama(max_position_embeddings=context)
        assert sampling._length(model, SamplingConfig()) == length
        assert sampling._length(convert(model, ConversionConfig()), SamplingConfig()) == length


def test_the_loss_on_a_models_own_samples_is_its_entropy(shared_data):
    source = shared_data / "models/stories15M"
    model, tokenizer = load_model(source), load_tokenizer(source)
    config = SamplingConfig(tokens=3000, length=100, batch_size=30)
    found = [document for batch in sample(model, tokenizer, config) for document in batch]
    assert sum(document.comes_back for document in found) > 0.8 * len(found)
    losses, entropies = [], []
    for document in found[:30]:
        ids = torch.tensor([[1, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    loss, entropy = torch.cat(losses), torch.cat(entropies)
    standard_error = (loss - entropy).std() / len(loss) ** 0.5
    assert abs((loss - entropy).mean()) < 4 * standard_error
    assert standard_error < 0.05
    assert sum(document.text.startswith(("Once upon a time", "One day")) for document in found) > len(found) // 2
