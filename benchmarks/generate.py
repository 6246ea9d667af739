"""Decoding text, one token at a time with a cache, against transformers on dense weights and on bitsandbytes NF4.

Greedy, a fixed number of new tokens. Ours runs the backbone and an untrained side network, whose cost is that of a
trained one. The dense models have random weights of their own; time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.kernels_path import kernels_path
from benchmarks.models import case_backbone, case_nf4_model
from benchmarks.registry import DTYPE_NAMES, TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape, prepare_checkpoint


def _call(model: PreTrainedModel, case: Case, context: Context) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (case.sizes["batch"], case.sizes["prompt"])
    prompt = torch.randint(case.sizes["vocab"], size, generator=generator).to(context.device)
    count = case.sizes["new"]

    def call() -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )

    return call


def _ladder(case: Case, context: Context) -> Runnable:
    from engine import LadderForCausalLM

    backbone = case_backbone(case, context)
    model = LadderForCausalLM.from_backbone(backbone).eval()
    details = f"{DTYPE_NAMES[backbone.dtype]} backbone with side network"
    return Runnable(_call(model, case, context), details=details, kernels=kernels_path(context.device))


def _dense(dtype: torch.dtype) -> Callable[[Case, Context], Runnable]:
    def build(case: Case, context: Context) -> Runnable:
        config = model_shape(case.model, case.sizes["vocab"]).config()
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(context.device).eval()
        return Runnable(_call(model, case, context), details=f"dense {DTYPE_NAMES[dtype]}")

    return build


def _bitsandbytes(case: Case, context: Context) -> Runnable:
    model = case_nf4_model(case, context, torch.bfloat16).eval()
    return Runnable(_call(model, case, context), details="bitsandbytes NF4, bf16")


def _case(name: str, model: str, batch: int, vocab: int | None, new: int, *devices: str) -> Case:
    vocab_size = model_shape(model, vocab).vocab_size
    sizes = {"batch": batch, "prompt": 16, "new": new, "vocab": vocab_size}
    return Case(name, sizes, model=model, tokens=batch * new, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="generate",
        summary="greedy decoding with a cache against transformers on dense and on bitsandbytes NF4 weights",
        cases=(
            _case("Qwen2.5-0.5B-v32000-b1", "Qwen2.5-0.5B", 1, 32000, 32, "cpu"),
            _case("Qwen2.5-0.5B-v32000-b8", "Qwen2.5-0.5B", 8, 32000, 32, "cpu"),
            _case("Qwen2.5-7B-b1", "Qwen2.5-7B", 1, None, 64, "cuda"),
        ),
        toy=_case(TOY, "toy", 2, None, 4, "cpu", "cuda"),
        implementations=(
            Implementation("ladder", _ladder, "ours"),
            Implementation("transformers_bf16", _dense(torch.bfloat16)),
            Implementation("transformers_fp32", _dense(torch.float32)),
            Implementation("bitsandbytes", _bitsandbytes),
        ),
        isolated=True,
        seconds=40.0,
        prepare=prepare_checkpoint,
    ),
)
