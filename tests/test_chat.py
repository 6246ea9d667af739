"""Conversations: which tokens of a rendered chat template are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_tokenizer
from samples import CHAT, learned_text, prepared, write
from tokenizers.processors import ByteLevel

from engine.data.chat import TemplateError, assistant_spans
from engine.data.dataset import show_sample
from engine.data.records import DataError


def test_assistant_turns_only() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "four"},
    ]
    sample = prepared([{"messages": messages}])[0]
    assert learned_text(sample) == "two<eos>four<eos>"
    start = "<|system|>s<eos><|user|>one<eos><|assistant|>[[two<eos>]]"
    assert show_sample(sample, tiny_tokenizer()) == start + "<|user|>two<eos><|assistant|>[[four<eos>]]"


def test_eos_follows_a_template_that_ends_otherwise() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = prepared(
        [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": " a "}]}], tokenizer=tokenizer
    )[0]
    assert learned_text(sample) == "a[end]<eos>"


SCAFFOLD = (
    "{% for m in messages %}<im>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
MARKED = "{%% for m in messages %%}{{ m.role }}:%s{%% endfor %%}"


def dialogue(*contents: str, roles: str = "user assistant") -> dict[str, Any]:
    return {"messages": [{"role": roles.split()[i % 2], "content": text} for i, text in enumerate(contents)]}


def shown(conversation: dict[str, Any], template: str | None = None, trim: bool = False) -> str:
    """The conversation as prepared, with [[ ]] around what is learned."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    if trim:
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return show_sample(prepared([conversation], 256, tokenizer=tokenizer)[0], tokenizer)


@pytest.mark.parametrize("answer", ["n", "hi", "t", "<", "e", "o", "assistant", "<think>", "\u2063X\u2063"])
def test_answers_that_occur_in_the_template(answer: str) -> None:
    start, thought = "<im>user\nu<eos>\n<im>assistant\n", "<think>\n\n</think>\n\n"
    expected = f"{start}[[{answer}<eos>]]\n{start}[[{thought}{answer}<eos>]]"
    assert shown(dialogue("u", answer, "u", answer), SCAFFOLD) == expected
    unless = SCAFFOLD.replace("if loop.last", "if '</think>' not in m.content and loop.last")
    answer = f"<think>\nw\n</think>\n\n{answer}"
    assert shown(dialogue("u", answer), unless) == f"{start}[[{answer}<eos>]]"


def test_assistant_may_open_the_conversation() -> None:
    expected = "<|assistant|>[[hi<eos>]]<|user|>u<eos><|assistant|>[[yo<eos>]]"
    assert shown(dialogue("hi", "u", "yo", roles="assistant user")) == expected


@pytest.mark.parametrize("code", ["x = 1", "def f(x):\n    if x:\n        return x", "a  b", "    x = 1"])
def test_spaces_are_learned_whatever_the_offsets(code: str) -> None:
    assert shown(dialogue("u  u", code), SCAFFOLD, trim=True).endswith(f"[[<think>\n\n</think>\n\n{code}<eos>]]")


@pytest.mark.parametrize(
    "turn, learned",
    [
        ("[m]", "[[bye<eos>]]"),
        ("[m]<eos>\n", "[[bye<eos>]]"),
        ("[m] <eos>\n", "[[bye <eos>]]"),
        ("[m<eos>]\n", "[[bye<eos>]]"),
        ("[m<eos>\n]", "[[bye<eos>]]"),
        ("[m]<pad>\n", "[[bye<pad><eos>]]"),
        ("[m](end)\n", "[[bye]](end)[[<eos>]]"),
    ],
)
def test_generation_markers_are_used(turn: str, learned: str) -> None:
    for short, long in ("m", "{{ m.content }}"), ("[", "{% generation %}"), ("]", "{% endgeneration %}"):
        turn = turn.replace(short, long, 1)
    template = MARKED % f"{{% if m.role == 'assistant' %}}{turn}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    assert shown(dialogue("u", "bye"), template) == f"user:uassistant:{learned}"
    if "<" in turn:
        first = learned.replace("<pad><eos>", "<pad>").removesuffix("]]")
        assert shown(dialogue("u", "bye", "u", "b"), template).startswith(f"user:uassistant:{first}")


def test_generation_markers_around_nothing() -> None:
    with pytest.raises(DataError, match="has no token to learn"):
        shown(CHAT, MARKED % "{{ m.content }}{% generation %}{% endgeneration %}")


def test_templates_that_hide_the_turns() -> None:
    def rewriting(messages: Any, opening: bool) -> str:
        return f"{len(messages)}" + "".join(message["content"] for message in messages) + ">" * opening

    with pytest.raises(TemplateError, match="rewrites what comes before message 1"):
        assistant_spans(CHAT["messages"], rewriting)
    with pytest.raises(TemplateError, match="changes the content of message 1"):
        assistant_spans(CHAT["messages"], lambda messages, opening: "x" * len(messages))


def test_refusing_template_names_the_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 1, field `messages`: the chat template refuses .*roles must alternate"):
        prepared(write(tmp_path, CHAT), tokenizer=tokenizer)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(DataError, match=r"line 1, field `messages`: the chat template refuses .*concatenate str"):
        prepared(write(tmp_path, CHAT), tokenizer=tokenizer)
