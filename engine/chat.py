"""Where the assistant speaks in a rendered conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Render = Callable[[Sequence[Mapping[str, str]], bool], str]


class TemplateError(ValueError):
    """The chat template cannot render a conversation, or hides where the assistant's turns are."""


def assistant_spans(messages: Sequence[Mapping[str, str]], render: Render) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find what the model is to learn to say.

    A turn starts where the generation prompt ends and runs over its content to the template's end of turn, which
    is therefore learned as well. What follows the last turn, if the assistant has the last word, is cut off.

    Args:
        messages: role and content of each message; at least one assistant.
        render: (messages, add_generation_prompt) to text: the chat template.

    Returns:
        The text, and the [start, end) character span of each assistant turn.

    Raises:
        TemplateError: the template rewrites an earlier turn when later ones follow, so its place cannot be told.
    """
    text, spans, end = render(messages, False), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = render(messages[:index], True)
        if not text.startswith(opening) or len(opening) < end:
            raise TemplateError(f"the chat template rewrites what comes before message {index}")
        content = message["content"].strip()
        begin = text.find(content, len(opening))
        if begin < 0:
            raise TemplateError(f"the chat template changes the content of message {index}")
        end = begin + len(content)
        closing = _end_of_turn(render(messages[: index + 1], False), content)
        if text.startswith(closing, end):
            end += len(closing)
        spans.append((len(opening), end))
    return (text[:end] if messages[-1]["role"] == "assistant" else text), spans


def _end_of_turn(rendered: str, content: str) -> str:
    """What the template writes after `content` at the end of `rendered`, without trailing white space."""
    place = rendered.rfind(content)
    return rendered[place + len(content) :].rstrip() if place >= 0 else ""
