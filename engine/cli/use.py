"""Commands that use what was trained: generate, chat, eval."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.errors import errors

BackboneOption = Annotated[str | None, typer.Option("--model", help="Where the backbone is now, if it was moved.")]
ResidencyOption = Annotated[
    str | None, typer.Option(help="device, or host: layers are streamed from host memory, for a small card.")
]
TemperatureOption = Annotated[float, typer.Option(help="0: always the likeliest token; 0.8: drawn at random.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the likeliest tokens of together this probability.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the random draws.")]


def _load(adapter: Path, backbone: Any, residency: str | None = None) -> Any:
    """A trained model on the GPU if there is one; beside a backbone that is loaded already, or loaded here."""
    import torch

    from engine.model.causal_lm import LadderForCausalLM

    options = {} if residency is None or not isinstance(backbone, str | None) else {"residency": residency}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LadderForCausalLM.from_pretrained(adapter, backbone=backbone, device=device, **options)


def _show(text: str) -> None:
    """Write a piece of an answer at once."""
    typer.echo(text, nl=False)


def generate(
    adapter: Annotated[Path, typer.Option(help="Folder that `ladder train` wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn of the chat template.")] = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    model: BackboneOption = None,
    residency: ResidencyOption = None,
) -> None:
    """Continue a prompt with a trained side network; the text appears as it is generated."""
    with errors():
        import torch

        from engine.inference.generate import (
            Sampling,
            adapter_tokenizer,
            chat_ids,
            generate_text,
            prompt_ids,
            room_for_answer,
        )

        sampling = Sampling(temperature, top_p)
        ladder = _load(adapter, model, residency)
        tokenizer = adapter_tokenizer(adapter, ladder.backbone)
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt_ids(tokenizer, prompt)
        room = room_for_answer(ladder, len(ids))
        torch.manual_seed(seed)
        answer = generate_text(ladder, tokenizer, ids, min(max_new_tokens, room), sampling, _show)
        typer.echo()
        if not answer.is_finished and room < max_new_tokens:
            typer.echo("stopped: the backbone's context is full", err=True)


def chat(
    adapter: Annotated[list[Path], typer.Option(help="Folder that `ladder train` wrote; several share one backbone.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    model: BackboneOption = None,
    residency: ResidencyOption = None,
) -> None:
    """Talk with trained side networks; /adapter NAME switches between them, /reset forgets, /quit ends."""
    with errors():
        import torch

        from engine.inference.chat_session import ChatSession, load_voices
        from engine.inference.generate import Sampling

        sampling = Sampling(temperature, top_p)
        voices = load_voices(adapter, model, lambda folder, backbone: _load(folder, backbone, residency))
        torch.manual_seed(seed)
        ChatSession(voices, sampling, max_new_tokens, _show).run(_read_line)


def _read_line() -> str:
    """A line of standard input, with its editing keys where it is a terminal."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input("> ")


def evaluate(
    adapter: Annotated[Path, typer.Option(help="Folder that `ladder train` wrote.")],
    data: Annotated[str, typer.Option(help="Held-out jsonl, of the shapes of training data.")],
    max_length: Annotated[int, typer.Option(help="Longest sample, in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one pass.")] = 4,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    model: BackboneOption = None,
    residency: ResidencyOption = None,
) -> None:
    """Measure held-out loss and perplexity, with the side network and of the backbone alone."""
    with errors():
        # What can be told without the backbone comes first: loading it may take minutes.
        from engine.data.records import read_records

        records = read_records(data)
        if json is not None and (json.is_dir() or not json.parent.is_dir()):
            raise ValueError(f"--json {json}: expected a file in a folder that exists")
        from engine.data.dataset import prepare_dataset
        from engine.inference.evaluate import evaluate
        from engine.inference.generate import adapter_tokenizer

        ladder = _load(adapter, model, residency)
        tokenizer = adapter_tokenizer(adapter, ladder.backbone)
        shape = ladder.backbone.config
        samples = prepare_dataset(records, tokenizer, max_length=max_length, vocab_size=shape.vocab_size)
        if samples.longest > shape.max_position_embeddings:
            raise ValueError(
                f"{data}: the longest sample has {samples.longest:,} tokens and the backbone's context is "
                f"{shape.max_position_embeddings:,}; lower --max-length"
            )
        evaluation = evaluate(ladder, samples, batch_size)
        typer.echo("\n".join(evaluation.lines()))
        if json is not None:
            evaluation.write(json, adapter=str(adapter), data=data)
