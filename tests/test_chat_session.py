"""`ladder chat`: history, switching adapters beside one backbone, stopping, and the end of the context."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import SMALL, trained
from typer.testing import CliRunner

from engine import LadderConfig, LadderForCausalLM, load_backbone
from engine.cli import app
from engine.inference.chat_session import ChatSession, Voice, load_voices
from engine.inference.generate import PassedTokens, Sampling, chat_ids, generate_text

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 160


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of one backbone, and one of another."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed, weights in (("terse", 1, 0), ("chatty", 2, 0), ("foreign", 1, 7)):
        source = root / f"backbone{weights}"
        if not source.exists():
            tiny_checkpoint(root, "qwen2", seed=weights, max_position_embeddings=CONTEXT).rename(source)
        model = LadderForCausalLM.from_backbone(source, LadderConfig.preset("xladder", **SMALL))
        trained(model, seed).save_pretrained(root / name, tokenizer=model.backbone.tokenizer())
    return {name: root / name for name in ("terse", "chatty", "foreign")}


@pytest.fixture(scope="module")
def voices(folders: dict[str, Path]) -> dict[str, Voice]:
    return load_voices([folders["terse"], folders["chatty"]], None, LadderForCausalLM.from_pretrained)


def talk(
    voices: dict[str, Voice], lines: Iterable[str | type[BaseException]], max_new_tokens: int = 6
) -> tuple[str, ChatSession]:
    """All that is shown, and the session behind it."""
    shown: list[str] = []
    session = ChatSession(voices, Sampling(), max_new_tokens, shown.append)
    session.run(reading(lines))
    return "".join(shown), session


def reading(lines: Iterable[str | type[BaseException]]) -> Callable[[], str]:
    left = iter(lines)

    def read() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def expected(voice: Voice, messages: list[dict[str, str]], max_new_tokens: int = 6) -> str:
    return generate_text(voice.model, voice.tokenizer, chat_ids(voice.tokenizer, messages), max_new_tokens).text


def test_answers_are_what_the_model_says_to_the_whole_conversation(voices: dict[str, Voice]) -> None:
    """Through a switch of adapters and kept keys and values; another adapter says something else."""
    lines = ("one", "two", "/adapter chatty", "three", "four")
    shown, session = talk(voices, lines)
    history: list[dict[str, str]] = []
    for number, line in enumerate(("one", "two", "three", "four")):
        history.append({"role": "user", "content": line})
        answers = [expected(voice, history) for voice in voices.values()]
        assert answers[0] != answers[1]
        history.append({"role": "assistant", "content": answers[number // 2]})
        assert f"{answers[number // 2]}\n" in shown
    assert session.messages == history
    assert "terse speaks. /adapter NAME" in shown and "chatty speaks; the conversation goes on." in shown


def test_commands(voices: dict[str, Voice]) -> None:
    shown, session = talk(voices, ("one", "", "  ", "/adapter", "/adapter  nobody", "/rest", "/reset"))
    assert session.messages == []
    assert "\nLoaded: terse, chatty; terse speaks.\n" in shown
    assert "There is no adapter 'nobody'. Loaded: terse, chatty; terse speaks." in shown
    assert "There is no /rest here: /adapter NAME" in shown
    assert "The conversation is forgotten." in shown
    # Nothing is read behind /quit.
    assert talk(voices, ("/quit", RuntimeError))[1].messages == []


def test_ctrl_c_stops_the_answer_and_not_the_program(voices: dict[str, Voice]) -> None:
    """A real signal after the second piece; the next question is answered to what was said until then."""
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    session = ChatSession(voices, Sampling(), 30, show)
    session.run(reading(("one", KeyboardInterrupt, "two")))
    assert signal.getsignal(signal.SIGINT) is before
    text = "".join(shown)
    assert text.count("\n(stopped)\n") == 1 and "(/quit ends)" in text
    first, second = session.messages[1]["content"], session.messages[3]["content"]
    whole = expected(voices["terse"], session.messages[:1], 30)
    assert whole.startswith(first) and 0 < len(first) < len(whole)
    assert second == expected(voices["terse"], session.messages[:3], 30)


def test_the_end_of_the_context(voices: dict[str, Voice]) -> None:
    shown, session = talk(voices, ("x" * (CONTEXT + 1), "one"))
    assert f"(not sent: the prompt takes {CONTEXT + 4} tokens and the backbone's context is {CONTEXT}" in shown
    assert "/reset starts a new conversation" in shown
    assert [message["content"] for message in session.messages][:1] == ["one"]
    shown, session = talk(voices, ("x" * (CONTEXT - 12),), max_new_tokens=100)
    assert "(the backbone's context is full; /reset starts a new conversation)" in shown
    assert "(cut at 6 tokens, see --max-new-tokens)" in talk(voices, ("one",))[0]


def test_the_backbone_is_loaded_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    counted = lambda *a, **k: loads.append(a) or load_backbone(*a, **k)  # noqa: E731
    monkeypatch.setattr("engine.model.causal_lm.load_backbone", counted)
    given = ("chat", "--adapter", str(folders["terse"]), "--adapter", str(folders["chatty"]), "--residency", "host")
    result = CliRunner().invoke(app, [*given, "--max-new-tokens", "4"], input="one\n/adapter chatty\ntwo\n")
    assert result.exit_code == 0, result.output
    assert len(loads) == 1 and "chatty speaks" in result.output


def test_faults_of_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    def failure(*adapters: Path) -> str:
        options = [part for adapter in adapters for part in ("--adapter", str(adapter))]
        result = CliRunner().invoke(app, ["chat", *options], input="")
        assert result.exit_code == 2 and "Traceback" not in result.output
        return result.output

    assert "foreign: this adapter was trained beside the backbone" in failure(folders["terse"], folders["foreign"])
    assert "two adapters are called 'terse'" in failure(folders["terse"], folders["terse"])
    model = LadderForCausalLM.from_backbone(tiny_checkpoint(tmp_path, "qwen2", chat_template=False))
    model.save_pretrained(tmp_path / "plain", tokenizer=model.backbone.tokenizer())
    assert "the tokenizer has no chat template" in failure(tmp_path / "plain")


def test_passed_tokens_are_not_computed_again(voices: dict[str, Voice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the new columns pass the backbone; a prompt that does not go on from there starts over."""
    voice, passed = voices["terse"], PassedTokens()
    widths: list[int] = []
    run = LadderForCausalLM.forward

    @wraps(run)
    def counted(self: LadderForCausalLM, input_ids: torch.Tensor, **inputs: object) -> object:
        widths.append(input_ids.shape[1])
        return run(self, input_ids, **inputs)

    monkeypatch.setattr(LadderForCausalLM, "forward", counted)
    start = torch.arange(20)

    def answer(ids: torch.Tensor) -> str:
        widths.clear()
        return generate_text(voice.model, voice.tokenizer, ids, 4, passed=passed).text

    answer(start)
    seen = torch.tensor(passed._ids)
    assert widths == [20, 1, 1, 1] and len(seen) == 23
    longer = torch.cat((seen, torch.tensor([5, 6])))
    continued = answer(longer)
    assert widths == [2, 1, 1, 1]
    assert continued == generate_text(voice.model, voice.tokenizer, longer, 4).text
    answer(start)
    assert widths == [20, 1, 1, 1]
