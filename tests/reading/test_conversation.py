"""Conversations: the tokens of templates, what the model knows of earlier turns, ends, interruptions, memories."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from fastweights.embedded import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.models import convert
from fastweights.reading.conversation import ChatTemplate, Conversation
from fastweights.reading.memory import load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama
from tests.live_memory import LiveMemory

TEMPLATES = {
    "chatml": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|system|>\nNice.<|end|>\n' }}"
    "{% endif %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set system = '<<' + messages[0]['content'] + '>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    # The end of a text follows the last answer alone.
    "phi": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "labels": "{% for m in messages %}{{ '\n' if not loop.first }}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}",
}
MIXED = ["hybrid_sliding", "full_attention", "hybrid_sliding"]
SAID = ("Hello there,  \n", "and\n\n  now?", "naïve 漢字 🙂 \ue000", "x")
SETTINGS = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": None}


def with_template(tokenizer, name: str | None):
    tokenizer.chat_template = TEMPLATES.get(name) if name else None
    return tokenizer


MAKERS = {
    "gpt2": lambda: make_gpt2(n_positions=512),
    "llama": lambda: make_llama(max_position_embeddings=1024),
    "pure": lambda: convert(make_gpt2(), ConversionConfig(positions="drop")),
    "hybrid": lambda: convert(make_llama(), ConversionConfig(window=8)),
    "mixed": lambda: convert(make_llama(), ConversionConfig(window=8, layer_types=MIXED)),
}


def talk(model, template: str | None = "chatml", tokenizer=None, **changes) -> Conversation:
    """A conversation that never ends by itself, unless `changes` say so."""
    model.generation_config.eos_token_id = None
    return Conversation(model.eval(), with_template(tokenizer or byte_tokenizer(), template), SETTINGS | changes)


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def goes_on_with(model, ids: list[int], n: int = SETTINGS["max_new_tokens"]) -> list[int]:
    """What transformers' `generate` says to all the tokens at once."""
    whole = torch.tensor([ids])
    arguments = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    return model.generate(whole, attention_mask=torch.ones_like(whole), **arguments)[0, len(ids) :].tolist()


@pytest.mark.parametrize("system", [None, "Short answers."])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_turns_are_the_tokens_of_the_whole_conversation(name, kind, system, request):
    """Of tokenizers that put a mark before each text, too."""
    if kind == "words":
        path = request.getfixturevalue("shared_data") / "models" / "stories15M"
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = byte_tokenizer()
    conversation = Conversation(make_llama(), with_template(tokenizer, name), SETTINGS, system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    text, ids = "", []
    for i, said in enumerate(SAID):
        conversation.turns = conversation.tokens = i
        more = conversation._turn(said).tolist()
        messages.append({"role": "user", "content": said})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert whole.startswith(text)
        assert [*ids, *more] == tokenizer(whole, add_special_tokens=False)["input_ids"]
        messages.append({"role": "assistant", "content": "good"})
        text = whole + (" good" if name in ("llama 2", "labels") else "good")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", MAKERS)
def test_earlier_turns_are_known_as_if_all_were_read_at_once(name):
    model = MAKERS[name]()
    conversation, ids, tokenizer = talk(model), [], byte_tokenizer()
    for i, said in enumerate(("Hi!", "What?", "And then?")):
        template = conversation.template
        ids += bytes_of(template.next(said) if i else template.first(said))
        answer = goes_on_with(model, ids)
        parts: list[str] = []
        conversation.read(said)
        assert conversation.answer(write=parts.append) == tokenizer.decode(answer, skip_special_tokens=True)
        assert "".join(parts) == tokenizer.decode(answer, skip_special_tokens=True)
        ids += answer
        assert (conversation.tokens, conversation.turns) == (len(ids), i + 1)


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_an_end_token_gives_way_to_the_templates_own(name):
    model = MAKERS[name]()
    first = bytes_of(talk(model).template.first("Hi!"))
    answer = goes_on_with(model, first)
    end = next(i for i in range(1, 7) if answer[i] not in answer[:i])
    conversation = talk(model)
    conversation._ends = {answer[end]}
    conversation.read("Hi!")
    conversation.answer()
    assert conversation.tokens == len(first) + end + 1
    whole = [*first, *answer[:end], *bytes_of(conversation.template.next("What?"))]
    conversation.read("What?")
    assert conversation.tokens == len(whole)
    conversation._ends = set()
    assert conversation.answer() == byte_tokenizer().decode(goes_on_with(model, whole), skip_special_tokens=True)


def test_what_ends_an_answer_is_what_the_model_and_the_template_say():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model = make_llama()
    for ends, expected in ((256, {256, 257}), ([1, 2], {1, 2, 257}), (None, {257})):
        model.generation_config.eos_token_id = ends
        assert Conversation(model, with_template(tokenizer, "chatml"), SETTINGS)._ends == expected
    model.generation_config.eos_token_id = 256
    for plain in ("labels", None):
        assert Conversation(model, with_template(tokenizer, plain), SETTINGS)._ends == {256}


class After:
    """True from the n-th time on that it is asked."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("name", ["gpt2", "hybrid", "mixed"])
@pytest.mark.parametrize("said", [0, 3])
def test_what_was_said_before_an_interruption_stands(name, said):
    model = MAKERS[name]()
    conversation = talk(model)
    ids = bytes_of(conversation.template.first("Hi!"))
    ids += goes_on_with(model, ids)[:said]
    conversation.read("Hi!")
    told = conversation.answer(interrupted=After(said))
    assert told == byte_tokenizer().decode(ids[len(ids) - said :], skip_special_tokens=True)
    assert conversation.tokens == len(ids)
    ids += bytes_of(conversation.template.next("What?"))
    conversation.read("What?")
    assert conversation.answer() == byte_tokenizer().decode(goes_on_with(model, ids), skip_special_tokens=True)


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_long_turn_that_is_interrupted_is_closed(monkeypatch, template):
    monkeypatch.setattr("fastweights.reading.conversation.PIECE", 16)
    model = MAKERS["hybrid"]()
    conversation = talk(model, template)
    read = []
    stop = After(2)
    conversation.read("one two three " * 20, interrupted=stop, progress=lambda done, total: read.append(done))
    assert conversation.answer(interrupted=stop) == ""
    assert read == [16, 32]
    ids = bytes_of(conversation.template.first("one two three " * 20))[:32]
    ids += bytes_of(conversation.template.opening() + conversation.template.next("What?"))
    conversation.read("What?")
    assert conversation.tokens == len(ids)
    assert conversation.answer() == byte_tokenizer().decode(goes_on_with(model, ids), skip_special_tokens=True)


def test_a_turn_that_is_interrupted_before_it_is_read_begins_all_the_same(tmp_path):
    """So that what a conversation begins with, and how a turn does, is never missing."""
    model = MAKERS["hybrid"]()
    conversation = talk(model)
    conversation.read("Hi!", interrupted=lambda: True)
    assert conversation.answer(interrupted=lambda: True) == ""
    assert conversation.tokens == len(bytes_of(conversation.template.first("Hi!")))
    plain = talk(model, None)
    plain.read("x", interrupted=lambda: True)
    plain.save(tmp_path / "memory")
    plain.load(tmp_path / "memory")


def test_a_saved_conversation_goes_on(tmp_path):
    model = MAKERS["hybrid"]()
    conversation, other = talk(model), talk(model)
    for said in ("Hi!", "What?"):
        conversation.read(said)
        conversation.answer()
    other.load(conversation.save(tmp_path / "m"))
    assert (other.tokens, other.turns) == (conversation.tokens, 2)
    answers = []
    for each in (conversation, other):
        each.read("And then?")
        answers.append(each.answer())
    assert answers[0] == answers[1]
    assert conversation.tokens == other.tokens
    empty = talk(model)
    empty.load(talk(model).save(tmp_path / "nothing"))
    assert (empty.tokens, empty.turns) == (0, 0)


def test_a_conversation_goes_on_from_a_text_with_its_first_turn(tmp_path):
    model = MAKERS["pure"]()
    text = bytes_of("A text.")
    new_memory(model).read([torch.tensor(text)]).save(tmp_path / "m")
    conversation = talk(model)
    conversation.load(tmp_path / "m")
    ids = text + bytes_of(conversation.template.first("Hi!"))
    conversation.read("Hi!")
    assert conversation.answer() == byte_tokenizer().decode(goes_on_with(model, ids), skip_special_tokens=True)
    memory = load_memory(model, conversation.save(tmp_path / "n"))
    assert memory.turns == memory.fork().turns == 1
    assert memory.read([torch.tensor(text)]).turns == 0


def test_softmax_over_all_tokens_is_not_saved(tmp_path):
    with pytest.raises(FastWeightsError, match="no memory of constant size"):
        talk(MAKERS["llama"]()).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow():
    def peak(turns: int) -> tuple[int, int, int]:
        conversation = talk(MAKERS["hybrid"]())
        with LiveMemory() as memory:
            for _ in range(turns):
                conversation.read("What?")
                conversation.answer()
        held = sum(len(x) for x in vars(conversation).values() if isinstance(x, list | set | dict))
        return memory.peak, conversation.size(), held

    assert peak(3) == peak(9)
    grows = talk(MAKERS["llama"]())
    sizes = []
    for _ in range(2):
        grows.read("What?")
        grows.answer()
        sizes.append(grows.size())
    assert sizes[0] < sizes[1]


def test_where_positions_end_a_turn_is_refused_and_an_answer_cut():
    model = make_gpt2()
    conversation = talk(model, None)
    conversation.read("a" * 120)
    conversation.answer()
    assert conversation.tokens == 127
    with pytest.raises(
        FastWeightsError, match="has 127 tokens, this turn 3, and this model's absolute positions end at 128"
    ):
        conversation.read("bb")
    assert (conversation.tokens, conversation.turns) == (127, 1)
    conversation = talk(model, None)
    conversation.read("a" * 125)
    conversation.answer()
    assert conversation.tokens == 129


def test_a_tokenizer_without_template_goes_on_with_text():
    conversation = talk(make_llama(), None)
    assert conversation.template.plain
    assert conversation.template.first("One") == "One"
    assert conversation.template.next("two") == "\ntwo"
    assert ChatTemplate(byte_tokenizer(), "Once.").first("One") == "Once.\nOne"


def test_a_start_token_comes_first_where_there_is_no_template(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories15M")
    conversation = talk(make_llama(), None, tokenizer)
    assert conversation._turn("One day").tolist() == tokenizer("One day")["input_ids"]


@pytest.mark.parametrize(
    ("template", "system", "expected"),
    [
        (
            "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' else '' }}",
            "x",
            "leave the",
        ),
        ("{{ raise_exception('never') }}", None, r"\(never\): give a model with another"),
        ("{% for", None, "takes no such conversation"),
        ("{{ messages[-1]['content'] }}", None, "leaves out what was said"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "x",
            "no place for a system",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, system, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(FastWeightsError, match=expected) as error:
        ChatTemplate(tokenizer, system)
    assert "\n" not in str(error.value)


def test_what_is_no_text_is_refused():
    conversation = talk(make_llama())
    with pytest.raises(FastWeightsError, match="no UTF-8 text"):
        conversation.read("\udcff")
    assert conversation.turns == 0
