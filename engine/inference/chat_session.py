"""A conversation in a terminal with one or several side networks beside one resident backbone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from transformers import PreTrainedTokenizerBase

from engine.inference.generate import (
    PassedTokens,
    Sampling,
    Show,
    adapter_tokenizer,
    chat_ids,
    check_chat_template,
    generate_text,
    room_for_answer,
)
from engine.model.causal_lm import LadderForCausalLM

COMMANDS = "/adapter NAME speaks with another adapter, /reset forgets the conversation, /quit ends"

Load = Callable[[Path, object], LadderForCausalLM]


@dataclass(frozen=True)
class Voice:
    """A side network beside the shared backbone, and the tokenizer whose chat template it was trained with."""

    model: LadderForCausalLM
    tokenizer: PreTrainedTokenizerBase


def load_voices(folders: Sequence[Path], backbone: str | None, load: Load) -> dict[str, Voice]:
    """Adapters by name, the last part of their folder, all beside the backbone of the first.

    Args:
        folders: adapter folders.
        backbone: where the backbone is, if it was moved.
        load: (folder, backbone or where it is) to a model.

    Raises:
        ValueError: two adapters of one name, one of another backbone, or one without a chat template.
    """
    voices: dict[str, Voice] = {}
    shared: object = backbone
    for folder in folders:
        name = folder.resolve().name
        if name in voices:
            raise ValueError(f"two adapters are called {name!r}, and /adapter could not tell them apart; rename one")
        model = load(folder, shared)
        shared = model.backbone
        voices[name] = Voice(model, adapter_tokenizer(folder, model.backbone))
        check_chat_template(voices[name].tokenizer)
    return voices


@dataclass
class ChatSession:
    """The conversation so far and who speaks next.

    Attributes:
        voices: adapters by name; the first one begins.
        sampling: how tokens are chosen.
        max_new_tokens: longest answer.
        show: writes text as it comes.
    """

    voices: Mapping[str, Voice]
    sampling: Sampling
    max_new_tokens: int
    show: Show
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._speak_as(next(iter(self.voices)))

    def run(self, read: Callable[[], str]) -> None:
        """Answer line after line until /quit or the end of input; Ctrl-C stops an answer, never the program.

        Args:
            read: the next line; raises EOFError where there is none.
        """
        self.show(f"{self._name} speaks. {COMMANDS}; Ctrl-C stops an answer.\n")
        while True:
            try:
                line = read().strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.show(self._command(line) + "\n")
                elif line:
                    self._answer(line)
            except EOFError:
                self.show("\n")
                return
            except KeyboardInterrupt:
                self.show("\n(/quit ends)\n")

    def _command(self, line: str) -> str:
        command, _, name = line.partition(" ")
        if command == "/reset" and not name:
            self.messages.clear()
            return "The conversation is forgotten."
        if command != "/adapter":
            return f"There is no {line.split()[0]} here: {COMMANDS}."
        if name.strip() not in self.voices:
            wrong = f"There is no adapter {name.strip()!r}. " if name.strip() else ""
            return f"{wrong}Loaded: {', '.join(self.voices)}; {self._name} speaks."
        self._speak_as(name.strip())
        return f"{self._name} speaks; the conversation goes on."

    def _speak_as(self, name: str) -> None:
        self._name, self._passed = name, PassedTokens()

    def _answer(self, line: str) -> None:
        """Stream an answer; the turn is only remembered if there was room for one."""
        voice = self.voices[self._name]
        turn = [*self.messages, {"role": "user", "content": line}]
        try:
            ids = chat_ids(voice.tokenizer, turn)
            room = room_for_answer(voice.model, len(ids))
        except ValueError as error:
            self.show(f"(not sent: {error}; /reset starts a new conversation)\n")
            return
        limit = min(room, self.max_new_tokens)
        with _interrupts() as is_interrupted:
            answer = generate_text(
                voice.model, voice.tokenizer, ids, limit, self.sampling, self.show, is_interrupted, self._passed
            )
            is_stopped = is_interrupted()
        self.messages = [*turn, {"role": "assistant", "content": answer.text}]
        self.show("\n")
        if is_stopped:
            self.show("(stopped)\n")
        elif not answer.is_finished:
            full = "the backbone's context is full; /reset starts a new conversation"
            self.show(f"({full if room <= self.max_new_tokens else f'cut at {limit} tokens, see --max-new-tokens'})\n")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside, where it raises nothing: a pass that it broke off could not be repeated."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
