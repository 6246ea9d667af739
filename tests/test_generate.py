"""Text from a trained model: what is streamed is what is said, sampling, stopping, prompts, and the command."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tokenizer
from ladders import SMALL, batch, ladder_model, trained
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from engine import LadderConfig, LadderForCausalLM
from engine.cli import app
from engine.inference.generate import (
    Sampling,
    _TextStreamer,
    adapter_tokenizer,
    chat_ids,
    generate_text,
    prompt_ids,
    room_for_answer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LadderForCausalLM:
    return trained(ladder_model())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its tokenizer; its backbone has a context of 48 tokens."""
    folder = tmp_path_factory.mktemp("adapters") / "docs"
    source = tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2", max_position_embeddings=48)
    ladder = trained(LadderForCausalLM.from_backbone(source, LadderConfig.preset("ladder", **SMALL)))
    ladder.save_pretrained(folder, tokenizer=ladder.backbone.tokenizer())
    return folder


def ladder(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: a space is part of the word behind it, and decoding drops the first of a text."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<eos>", "<unk>", "\n", "▁", "▁▁▁▁", "▁def", "▁return", "return", *bytes_]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_streamed_text_is_the_text(model: LadderForCausalLM) -> None:
    """Random tokens of single bytes are mostly broken UTF-8: the hardest stream there is."""
    tokenizer, many = tiny_tokenizer(), Sampling(temperature=3.0)
    for seed in range(2):
        pieces: list[str] = []
        torch.manual_seed(seed)
        streamed = generate_text(model, tokenizer, batch(9), 24, many, pieces.append)
        torch.manual_seed(seed)
        assert streamed == generate_text(model, tokenizer, batch(9), 24, many)
        assert "".join(pieces) == streamed.text and len(pieces) > 3


def test_indentation_and_split_characters_survive_streaming() -> None:
    """Every line keeps its first space, and a character of three tokens comes when it is whole."""
    tokenizer, pieces = spaced_tokenizer(), []
    streamer = _TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[5, 5]]))
    for token in (5, 2, 4, 7, *(8 + byte for byte in "…".encode()), 0):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["def", "\n", "    ", "return", "…"]


def test_greedy_is_the_default_and_sampling_depends_on_the_seed(model: LadderForCausalLM) -> None:
    tokenizer, ids = tiny_tokenizer(), batch(9)
    assert generate_text(model, tokenizer, ids, 8) == generate_text(model, tokenizer, ids, 8)

    def drawn(seed: int, **options: float) -> str:
        torch.manual_seed(seed)
        return generate_text(model, tokenizer, ids, 8, Sampling(**options)).text

    assert drawn(1, temperature=2.0) == drawn(1, temperature=2.0) != drawn(2, temperature=2.0)
    # So little probability, or so cold, that one token is left.
    assert drawn(1, temperature=2.0, top_p=1e-6) == generate_text(model, tokenizer, ids, 8).text
    assert drawn(1, temperature=1e-4) == generate_text(model, tokenizer, ids, 8).text


def test_settings_that_came_with_the_backbone_have_no_say(
    model: LadderForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As instruct models have them: no penalty, no warning, and draws from all tokens."""
    tokenizer, ids, sampling = tiny_tokenizer(), batch(9), Sampling(temperature=3.0)
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 1, "repetition_penalty": 30.0}
    plain = generate_text(model, tokenizer, ids, 12)
    torch.manual_seed(1)
    drawn = generate_text(model, tokenizer, ids, 12, sampling)
    assert drawn != plain
    for name, value in given.items():
        monkeypatch.setattr(model.generation_config, name, value)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert generate_text(model, tokenizer, ids, 12) == plain
    torch.manual_seed(1)
    assert generate_text(model, tokenizer, ids, 12, sampling) == drawn
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5; expected more than 0"),
        ({"top_p": 0.9}, "temperature 0 always takes the most likely token"),
    ],
)
def test_sampling_that_has_no_meaning(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_stopping_between_tokens(model: LadderForCausalLM) -> None:
    """The caller ends an answer after the token that is being made; training mode is as it was."""
    count = iter(range(100))
    model.train()
    cut = generate_text(model, tiny_tokenizer(), batch(9), 20, should_stop=lambda: next(count) == 4)
    assert model.training and not cut.is_finished
    assert next(count) == 5
    model.eval()
    assert generate_text(model, tiny_tokenizer(), batch(9), 20).text.startswith(cut.text)


def test_the_backbones_own_ends_of_turn_end_an_answer(model: LadderForCausalLM) -> None:
    ids, tokenizer = batch(9), tiny_tokenizer()
    first = int(model(ids[None]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [256, first]
    try:
        assert generate_text(model, tokenizer, ids, 20).is_finished
    finally:
        model.generation_config.eos_token_id = 256


def test_prompts() -> None:
    plain, silent = tiny_tokenizer(), tiny_tokenizer(chat_template=False)
    assert prompt_ids(plain, "ab").tolist() == plain("ab")["input_ids"]
    assert plain.decode(chat_ids(plain, [{"role": "user", "content": "ab"}])) == "<|user|>ab<eos><|assistant|>"
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(plain, "")
    with pytest.raises(ValueError, match="no chat template, so there is no telling"):
        chat_ids(silent, [{"role": "user", "content": "ab"}])
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="cannot render this conversation: roles must alternate"):
        chat_ids(plain, [{"role": "user", "content": "ab"}])


def test_an_adapter_without_a_tokenizer_uses_the_backbones(adapter: Path, tmp_path: Path) -> None:
    model = LadderForCausalLM.from_pretrained(adapter)
    model.save_pretrained(tmp_path)
    tokenizer = adapter_tokenizer(tmp_path, model.backbone)
    assert tokenizer("ab")["input_ids"] == adapter_tokenizer(adapter, model.backbone)("ab")["input_ids"]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="no usable tokenizer in"):
        adapter_tokenizer(tmp_path, model.backbone)


def test_command(adapter: Path) -> None:
    """Streamed text on stdout, the note of a full context on stderr; faults are one message."""
    model = LadderForCausalLM.from_pretrained(adapter)
    tokenizer = adapter_tokenizer(adapter, model.backbone)
    expected = generate_text(model, tokenizer, prompt_ids(tokenizer, "1 plus 2"), 6).text
    given = ("generate", "--adapter", adapter, "--prompt", "1 plus 2")
    result = ladder(*given, "--max-new-tokens", 6)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")
    drawn = [ladder(*given, "--temperature", 3, "--seed", seed, "--max-new-tokens", 6).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    assert room_for_answer(model, 47) == 1
    full = ladder("generate", "--adapter", adapter, "--prompt", "x" * 45, "--residency", "host")
    assert full.exit_code == 0 and "stopped: the backbone's context is full" in full.stderr
    long = ladder("generate", "--adapter", adapter, "--prompt", "x" * 48)
    assert long.exit_code == 2 and "the prompt takes 48 tokens and the backbone's context is 48" in long.stderr
    odd = ladder(*given, "--top-p", 0.5)
    assert odd.exit_code == 2 and "error: top_p is 0.5, but temperature 0" in odd.stderr
