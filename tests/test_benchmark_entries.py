"""Every registry entry runs and computes what it says, model shapes are the published ones, pytest-benchmark works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.qlora import qlora_loss, qlora_model
from benchmarks.registry import (
    TOY,
    Benchmark,
    Case,
    Context,
    Implementation,
    find_benchmark,
    load_benchmarks,
)
from benchmarks.shapes import SHAPES, model_shape, random_nf4_weight, write_random_checkpoint
from engine.backbone.layout import packed_nbytes
from engine.backbone.residency import Placement
from engine.dtypes import compute_dtype
from engine.sequence import SequenceLayout
from ladder_kernels import dequantize_nf4

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRIES = [
    pytest.param(benchmark, implementation, id=f"{benchmark.name}-{implementation.name}")
    for benchmark in load_benchmarks().values()
    for implementation in benchmark.implementations
]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("benchmark"))


def _prepared(benchmark: Benchmark, context: Context) -> Benchmark:
    if benchmark.prepare is not None:
        benchmark.prepare(benchmark.toy, context)
    return benchmark


@pytest.mark.parametrize(("benchmark_entry", "implementation"), ENTRIES)
def test_every_implementation_runs_at_its_toy_shape(
    benchmark_entry: Benchmark, implementation: Implementation, context: Context
) -> None:
    benchmark = _prepared(benchmark_entry, context)
    runnable = implementation.build(benchmark.toy, context)
    runnable.call()
    runnable.call()
    runnable.close()
    assert bool(runnable.kernels) == (implementation.kind == "ours")


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("nf4_linear", 1e-6), ("dequantize_nf4", 0.0), ("side_layer", 1e-6), ("rms_norm", 1e-6), ("rotary", 1e-6)],
)
def test_implementations_of_an_operation_compute_the_same(name: str, tolerance: float, context: Context) -> None:
    benchmark = find_benchmark(name)
    competitors = [item for item in benchmark.implementations if item.kind != "bound" or name == "dequantize_nf4"]
    runnables = {item.name: item.build(benchmark.toy, context) for item in competitors}
    expected = runnables.pop("ladder_kernels").call().double()
    for rival, runnable in runnables.items():
        error = float((runnable.call().double() - expected).abs().max() / expected.abs().max())
        # bitsandbytes' kernel for CPUs with bf16 units rounds x and the scales to bf16 whatever it is given.
        assert error <= (2**-7 if runnable.details.startswith("packed AVX512-BF16") else tolerance), rival


def test_first_loss_of_every_train_step_is_that_of_the_same_backbone(context: Context) -> None:
    """Side networks and adapters start as zero, so ladder, xladder and fp32 QLoRA must agree on the very first loss.

    Where the CPU has bf16 units ours computes in bf16, whose rounding the mean over tokens mostly averages out.
    """
    tolerance = 1e-5 if compute_dtype("cpu") == torch.float32 else 1e-3
    benchmark = _prepared(find_benchmark("train_step"), context)
    names = ("ladder", "xladder", "ladder_deterministic", "qlora_fp32", "qlora_fp32_kept")
    losses = [benchmark.implementation(name).build(benchmark.toy, context).call() for name in names]
    assert losses[0] == losses[1]
    for name, loss in zip(names, losses, strict=True):
        assert abs(float(loss) - float(losses[0])) <= tolerance * float(losses[0]), name


def test_steps_train(context: Context) -> None:
    benchmark = _prepared(find_benchmark("train_step"), context)
    for name in ("ladder", "qlora"):
        step = benchmark.implementation(name).build(benchmark.toy, context).call
        losses = [float(step()) for _ in range(4)]
        assert losses[-1] < losses[0], name


def test_registry_refuses_two_cases_of_one_name() -> None:
    case = Case("a", {})
    with pytest.raises(ValueError, match="every case needs a name of its own"):
        Benchmark("b", "", (case, case), Case(TOY, {}), ())
    with pytest.raises(ValueError, match="the toy case must be named 'toy', got 'a'"):
        Benchmark("b", "", (), case, ())


def test_shapes_have_the_published_parameter_counts() -> None:
    published = {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-3B": 3_085_938_688,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen2.5-14B": 14_770_033_664,
        "Qwen2.5-32B": 32_763_876_352,
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-70B": 70_553_706_496,
        "Llama-2-7B": 6_738_415_616,
    }
    from transformers import AutoModelForCausalLM

    assert set(published) == set(SHAPES) - {TOY}
    for name, count in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_shape(name).config())
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name
    with pytest.raises(ValueError, match="unknown model shape 'x'; expected one of: Qwen2"):
        model_shape("x")


def test_random_weights_look_like_weights() -> None:
    weight = random_nf4_weight(96, 64, torch.Generator().manual_seed(0))
    dense = dequantize_nf4(weight, torch.float32)
    assert weight.double_quant and dense.shape == (96, 64)
    assert 0.01 < float(dense.std()) < 0.05
    assert abs(float(dense.mean())) < 0.01


def test_models_built_in_memory_are_those_of_the_checkpoint(context: Context) -> None:
    """Ours and QLoRA's: what a GPU is measured on is what a CPU loads from files."""
    toy = _prepared(find_benchmark("train_step"), context).toy
    input_ids = torch.arange(24) % toy.sizes["vocab"]
    layout = SequenceLayout.packed([24])
    shape, dtype = model_shape("toy"), torch.float32
    loaded = models.case_backbone(toy, context)
    for placement in (
        Placement(),
        Placement("host"),
        Placement("auto", layer_budget=3 * packed_nbytes(loaded.blocks[0])),
    ):
        built = models.random_backbone(shape, context.device, placement=placement)
        assert bool(built.layers.host_nbytes) == (not placement.is_direct)
        for (_, expected), (_, actual) in zip(
            loaded.hidden_states(input_ids, layout), built.hidden_states(input_ids, layout), strict=True
        ):
            assert torch.equal(actual, expected)
    expected, actual = (
        model.train()(input_ids[None]).logits  # bitsandbytes packs its weights anew for evaluation on some CPUs
        for model in (models.case_nf4_model(toy, context, dtype), models.random_nf4_model(shape, context.device, dtype))
    )
    assert torch.equal(actual, expected)


def test_adapters_are_put_on_a_model_built_in_memory(context: Context) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    model = models.random_nf4_model(model_shape("toy"), context.device, torch.float32)
    adapted = qlora_model(model, checkpointing=True)
    assert sum(isinstance(module, Linear4bit) for module in adapted.modules()) == 7 * 4
    input_ids = torch.arange(24)[None]
    qlora_loss(adapted, input_ids, input_ids, torch.float32).backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)


def test_a_random_checkpoint_is_reproducible(tmp_path: Path) -> None:
    for name in "ab":
        write_random_checkpoint(model_shape("toy"), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "config.json" in files and "ends.safetensors" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_registry_runs_through_pytest_benchmark() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "quantize_nf4-toy and not bitsandbytes"]
    # A process of its own, whichever worker of pytest-xdist has started it: with one it would measure nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    one_thread = inherited | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=one_thread)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_speed[quantize_nf4-toy-ladder_kernels]" in run.stdout


def test_plain_test_runs_do_not_collect_benchmarks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
