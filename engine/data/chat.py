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
        TemplateError: the template rewrites a turn or what comes before it, so its place cannot be told.
    """
    text, spans, end = render(messages, False), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        mark = _mark(text)
        before, after = _around(messages, index, mark, render)
        # An empty conversation cannot be rendered, so there is no generation prompt to ask for.
        opening = render(messages[:index], True) if index else before
        if not text.startswith(opening) or len(opening) < end:
            raise TemplateError(f"the chat template rewrites what comes before message {index}")
        end = _end_of_content(text, message["content"], (before, opening), after)
        if end <= len(opening):
            raise TemplateError(f"the chat template changes the content of message {index}")
        closing = _around(messages[: index + 1], index, mark, render)[1].rstrip()
        if text.startswith(closing, end):
            end += len(closing)
        end = len(text[:end].rstrip())
        spans.append((len(opening), end))
    return (text[:end] if messages[-1]["role"] == "assistant" else text), spans


def _mark(text: str) -> str:
    """A content that no template rewrites and that is not in `text`."""
    mark = "\u2063X\u2063"
    while mark in text:
        mark = f"\u2063X{mark[1:]}"
    return mark


def _around(messages: Sequence[Mapping[str, str]], index: int, mark: str, render: Render) -> tuple[str, str]:
    """What the template writes before and after the content of message `index`.

    The content itself is never searched for: a short answer may occur in what the template writes.
    """
    changed = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
    before, found, after = render(changed, False).partition(mark)
    if not found or mark in after:
        raise TemplateError(f"the chat template changes the content of message {index}")
    return before, after


def _end_of_content(text: str, content: str, befores: Sequence[str], after: str) -> int:
    """Where `content` ends if it is all that stands between one of `befores` and `after`, else -1."""
    end = len(text) - len(after)
    if text.endswith(after):
        for before in befores:
            if text.startswith(before) and text[len(before) : end].strip() == content.strip():
                return end
    return -1
