"""Pretrain the quickstart's backbone: a Llama of 3.0 M parameters on the source of Python's standard library.

    python -m engine.quickstart.pretrain --output engine/quickstart/backbone

Tokenizer: byte-level BPE of 4,096 entries, trained on the same text. Held-out modules (`corpus.is_heldout`) are seen by
neither. The library proper is repeated more often than its tests, which are longer and duller. AdamW, warm-up and
cosine, fp32, saved as bf16. `training.json` beside the weights records what the run reached: the shipped ones saw
30.1 M tokens in 115 minutes of two AVX-512 cores that other work shared. Why not wider: at this compute a 3.9 M model
would see a third fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.quickstart.corpus import SourceFile, is_heldout, standard_library

VOCAB_SIZE = 4096
CONTEXT = 256
FINAL_LR_SHARE, WARMUP_STEPS, WEIGHT_DECAY = 0.02, 200, 0.1
LIBRARY_EPOCHS, TEST_EPOCHS = 6, 3
END_OF_TEXT = "<|endoftext|>"


def backbone_config(
    hidden_size: int = 128, layers: int = 8, heads: int = 2, kv_heads: int = 1, head_dim: int = 64, mlp_size: int = 512
) -> LlamaConfig:
    """A Llama with an untied head; as shipped: two query heads of 64 sharing one key/value head, SwiGLU 512."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@dataclass(frozen=True)
class Pretraining:
    """What is trained and for how long; the defaults made the shipped backbone.

    Attributes:
        batch: windows of CONTEXT tokens in a step.
        max_minutes: ends a run early, annealed; then its result depends on the machine.
    """

    config: LlamaConfig = field(default_factory=backbone_config)
    steps: int = 7350
    batch: int = 16
    peak_lr: float = 3e-3
    seed: int = 0
    max_minutes: float = math.inf


def train_tokenizer(files: list[SourceFile]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `files`; the end-of-text token is id 0 and doubles as padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
    )


def token_stream(files: list[SourceFile], tokenizer: PreTrainedTokenizerFast, seed: int) -> np.ndarray:
    """Documents in random order, each repeated by its kind and closed by end-of-text, as one uint16 array."""
    repeated = [file for file in files for _ in range(TEST_EPOCHS if file.is_test else LIBRARY_EPOCHS)]
    random.Random(seed).shuffle(repeated)
    encoded = tokenizer.backend_tokenizer.encode_batch([file.text for file in files])
    ids = {
        file.path: np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16)
        for file, encoding in zip(files, encoded, strict=True)
    }
    return np.concatenate([ids[file.path] for file in repeated])


def batch_at(stream: np.ndarray, order: np.ndarray, step: int, batch: int = 16) -> torch.Tensor:
    """Token ids [batch, CONTEXT + 1] of one step: consecutive windows of the stream in shuffled order."""
    windows = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
    rows = [stream[window * CONTEXT : window * CONTEXT + CONTEXT + 1] for window in windows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting ids[:, 1:] from ids[:, :-1]."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: np.ndarray, batches: int = 20) -> float:
    """Mean loss over the first `batches` batches of held-out text."""
    order = np.random.default_rng(0).permutation((len(stream) - 1) // CONTEXT)
    rows = [batch_at(stream, order, i).to(model.device) for i in range(batches)]
    return float(np.mean([next_token_loss(model, ids).item() for ids in rows]))


def optimizer_of(model: LlamaForCausalLM, peak_lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)


def learning_rate(peak_lr: float, step: int, progress: float) -> float:
    """Linear warm-up over steps, then a cosine over the progress of the run down to FINAL_LR_SHARE of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak_lr * warmup * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def pretrain(
    output: Path,
    run: Pretraining,
    files: list[SourceFile],
    tokenizer: PreTrainedTokenizerFast | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train on what `files` do not hold out; save model, tokenizer and `training.json` into `output`.

    Args:
        tokenizer: one of VOCAB_SIZE entries; None trains it on the same text.
        device: on CUDA the matrix products run in bf16.
    """
    torch.manual_seed(run.seed)
    train_files = [file for file in files if not is_heldout(file.module)]
    tokenizer = tokenizer or train_tokenizer(train_files)
    stream = token_stream(train_files, tokenizer, run.seed)
    heldout = token_stream([f for f in files if is_heldout(f.module) and not f.is_test], tokenizer, run.seed)
    model = LlamaForCausalLM(run.config).to(device)
    tokenizer.save_pretrained(output)
    print(f"{len(stream):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for record in optimized(model, run, stream):
        save(model, output, {"heldout_loss": heldout_loss(model, heldout), **record, "available_tokens": len(stream)})


def optimized(model: LlamaForCausalLM, run: Pretraining, stream: np.ndarray) -> Iterator[dict[str, float]]:
    """Train `model` on windows of `stream`; yields what was spent every 500 steps and at the end."""
    order = np.random.default_rng(run.seed).permutation((len(stream) - 1) // CONTEXT)
    compiled_loss, optimizer = torch.compile(next_token_loss), optimizer_of(model, run.peak_lr)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.peak_lr, step, progress)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = compiled_loss(model, batch_at(stream, order, step, run.batch).to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens, seconds = step * run.batch * CONTEXT, time.monotonic() - started
        # Whichever runs out first, so that a slow machine still ends with an annealed model.
        progress = max(step / run.steps, seconds / (60 * run.max_minutes))
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} tokens {tokens:,} {tokens / seconds:.0f} tok/s", flush=True)
        if step % 500 == 0 or progress >= 1.0:
            yield {"tokens": tokens, "steps": step, "minutes": seconds / 60, "seed": run.seed}


def save(model: LlamaForCausalLM, output: Path, record: dict[str, float]) -> None:
    """Write the weights as bf16, which is what the quickstart ships, and the record of the run."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output, state_dict=weights)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record, flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-minutes", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output, Pretraining(seed=args.seed, max_minutes=args.max_minutes), standard_library())


if __name__ == "__main__":
    main()
