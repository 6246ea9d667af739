"""Real models' shapes by name, and random checkpoints of those shapes.

Weights are random codes and scales in the layout of a bitsandbytes NF4 checkpoint, so no 7B is ever quantized or
downloaded. On a CPU every implementation loads the very same files through its public loader; on a GPU
`benchmarks.models` builds the same tensors in device memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.registry import Case, Context
from ladder_kernels import NF4Weight, quantize_nf4


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only model of the Llama or Qwen2 family."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float | None = None  # Llama 3's frequency-dependent scaling

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear of a block, by its name within the block."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def config(self) -> PreTrainedConfig:
        """The transformers config of this shape."""
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_factor is not None:
            rope |= {"rope_type": "llama3", "factor": self.rope_factor, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.family]
        return config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters=rope,
            dtype="bfloat16",
        )


SHAPES = {
    "Qwen2.5-0.5B": ModelShape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True, 32768, 1e-6, 1e6),
    "Qwen2.5-1.5B": ModelShape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 131072, 1e-6, 1e6),
    "Qwen2.5-3B": ModelShape("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True, 32768, 1e-6, 1e6),
    "Qwen2.5-7B": ModelShape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 131072, 1e-6, 1e6),
    "Qwen2.5-14B": ModelShape("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False, 131072, 1e-5, 1e6),
    "Qwen2.5-32B": ModelShape("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False, 131072, 1e-5, 1e6),
    "Llama-3.2-1B": ModelShape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 131072, 1e-5, 5e5, 32.0),
    "Llama-3.1-8B": ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 131072, 1e-5, 5e5, 8.0),
    "Llama-3.1-70B": ModelShape("llama", 8192, 28672, 80, 64, 8, 128, 128256, False, 131072, 1e-5, 5e5, 8.0),
    "Llama-2-7B": ModelShape("llama", 4096, 11008, 32, 32, 32, 128, 32000, False, 4096, 1e-5, 1e4),
    "toy": ModelShape("qwen2", 64, 128, 4, 2, 1, 32, 256, True, 512, 1e-6, 1e4),
}


def model_shape(name: str, vocab_size: int | None = None) -> ModelShape:
    """The shape of that name, with another vocabulary size where one is given.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model shape {name!r}; expected one of: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    return shape if vocab_size is None else dataclasses.replace(shape, vocab_size=vocab_size)


def random_nf4_weight(rows: int, columns: int, generator: torch.Generator) -> NF4Weight:
    """A double-quantized NF4 weight [rows, columns] of uniform random codes, values within about +-0.05.

    It lies on the generator's device, and depends on it.
    """
    device = generator.device
    template = quantize_nf4(torch.ones(1, 64)).to(device)
    blocks = -(-rows * columns // template.block_size)

    def random_bytes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator, device=device)

    return dataclasses.replace(
        template,
        packed=random_bytes(-(-rows * columns // 2)),
        absmax=random_bytes(blocks),
        absmax_scale=torch.full((-(-blocks // 256),), 0.005, device=device),
        absmax_offset=torch.tensor(0.045, device=device),
        shape=(rows, columns),
        dtype=torch.bfloat16,
    )


def random_tensors(shape: ModelShape, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Random tensors of a model by checkpoint name, linears as bitsandbytes saves NF4: block by block, then the ends.

    They lie on the generator's device.
    """
    for index in range(shape.num_layers):
        yield dict(_block_tensors(shape, index, generator))
    size = (shape.vocab_size, shape.hidden_size)

    def table() -> Tensor:
        return (torch.randn(size, generator=generator, device=generator.device) * 0.02).bfloat16()

    ends = {"model.norm.weight": _ones(shape, generator), "model.embed_tokens.weight": table()}
    yield ends if shape.tie_word_embeddings else ends | {"lm_head.weight": table()}


def _ones(shape: ModelShape, generator: torch.Generator) -> Tensor:
    return torch.ones(shape.hidden_size, dtype=torch.bfloat16, device=generator.device)


def _block_tensors(shape: ModelShape, index: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{index}."
    for name, (rows, columns) in shape.linears.items():
        key = f"{prefix}{name}.weight"
        tensors = random_nf4_weight(rows, columns, generator).to_bitsandbytes(key)
        yield from tensors.items()
        if shape.family == "qwen2" and name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
            bias = torch.randn(rows, generator=generator, device=generator.device) * 0.02
            yield f"{prefix}{name}.bias", bias.bfloat16()
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", _ones(shape, generator)


def write_random_checkpoint(shape: ModelShape, folder: Path, seed: int = 0) -> None:
    """Write `folder` as transformers and bitsandbytes would save a model of this shape in NF4, one shard per block."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    size = 0

    def write_shard(file: str, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())

    for index, tensors in enumerate(random_tensors(shape, generator)):
        file = f"block-{index:03d}" if index < shape.num_layers else "ends"
        write_shard(f"{file}.safetensors", tensors)

    index_json = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    config = shape.config().to_dict()
    config["architectures"] = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.family]]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    (folder / "config.json").write_text(json.dumps(config))


def prepare_checkpoint(case: Case, context: Context) -> None:
    """`Benchmark.prepare` of entries with models: on a CPU the checkpoint of the case, in a folder of its name."""
    folder = context.folder / case.name
    if context.device.type == "cpu" and not folder.exists():
        write_random_checkpoint(model_shape(case.model, case.sizes["vocab"]), folder)
