"""The adapter folder: round trips to the bit, and every way it can be wrong."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tokenizer
from ladders import batch, checkpoint_folder, ladder_model, tiny_backbone, trained
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from engine.backbone import load_backbone
from engine.model.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter, read_adapter
from engine.model.causal_lm import LadderForCausalLM

IDS = batch(1, 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved ladder adapter."""
    trained(ladder_model()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("preset", ["ladder", "xladder", "lst", "qst", "rejoin"])
def test_round_trip_is_exact(tmp_path: Path, preset: str) -> None:
    model = trained(ladder_model(preset, tap_rank=3))
    model.save_pretrained(tmp_path)
    loaded = LadderForCausalLM.from_pretrained(tmp_path, backbone=tiny_backbone())
    assert loaded.ladder_config == model.ladder_config
    assert loaded.backbone is tiny_backbone()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not loaded.training


@pytest.mark.parametrize("options", [{}, {"quantize": False, "dtype": torch.bfloat16}, {"double_quant": False}])
def test_the_recorded_backbone_is_loaded_the_way_it_was(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(ladder_model(backbone=load_backbone(checkpoint_folder("qwen3"), **options)))
    model.save_pretrained(tmp_path)
    loaded = LadderForCausalLM.from_pretrained(tmp_path)
    assert (loaded.backbone.dtype, loaded.backbone.nbytes) == (model.backbone.dtype, model.backbone.nbytes)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_same_logits_in_a_new_process_without_a_network(folder: Path, tmp_path: Path) -> None:
    script = (
        "import socket, sys\n"
        "socket.socket.connect = socket.getaddrinfo = None\n"
        "import torch\n"
        "from engine.model.causal_lm import LadderForCausalLM\n"
        "model = LadderForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.tensor(eval(sys.argv[2]))).logits, sys.argv[3])\n"
    )
    arguments = [sys.executable, "-c", script, str(folder), repr(IDS.tolist()), str(tmp_path / "logits.pt")]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), trained(ladder_model())(IDS).logits)


def test_plain_transformers_finds_the_adapter(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).model_type == "ladder"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LadderForCausalLM)
    with pytest.raises(TypeError, match=r"takes dtype, device, .* of the backbone, got \['device_map'\]"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert torch.equal(model(IDS).logits, trained(ladder_model())(IDS).logits)


def test_dtype_can_be_chosen_on_loading(folder: Path) -> None:
    assert LadderForCausalLM.from_pretrained(folder, dtype="bfloat16").backbone.dtype == torch.bfloat16
    assert LadderForCausalLM.from_pretrained(folder, dtype="auto").backbone.dtype == torch.float32
    loaded = LadderForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert (loaded.backbone.dtype, loaded.dtype) == (torch.float16, torch.float32)


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    model = trained(ladder_model("xladder"))
    model.save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert content["format_version"] == 1
    assert content["ladder"] == model.ladder_config.to_dict()
    assert content["backbone"] == {
        "source": str(checkpoint_folder().resolve()),
        "fingerprint": model.backbone.fingerprint(),
        "dtype": "float32",
        "quantized": True,
        "double_quant": True,
    }
    weights = load_file(tmp_path / WEIGHTS_NAME)
    assert weights.keys() == model.side_network.state_dict().keys()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "cannot" not in (tmp_path / "README.md").read_text()
    assert "no weight in the backbone to merge it into" in (tmp_path / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_file_modes_follow_the_umask_and_never_widen(tmp_path: Path) -> None:
    def mode() -> int:
        return stat.S_IMODE((tmp_path / WEIGHTS_NAME).stat().st_mode)

    model = ladder_model()
    previous = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
        assert mode() == 0o640
        (tmp_path / WEIGHTS_NAME).chmod(0o600)
        model.save_pretrained(tmp_path)
        assert mode() == 0o600
    finally:
        os.umask(previous)


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / WEIGHTS_NAME).read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        ladder_model().save_pretrained(folder)
    assert (folder / WEIGHTS_NAME).read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_saving_follows_the_callers_state_dict(tmp_path: Path) -> None:
    model = ladder_model()
    state = {name: weight + 1 for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, safe_serialization=True, max_shard_size="1GB")
    assert torch.equal(load_file(tmp_path / WEIGHTS_NAME)["side_up"], state["model.side_network.side_up"])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"state_dict must be this model's own.*got \['side_up'\]"):
        model.save_pretrained(tmp_path, state_dict={"side_up": model.side_network.side_up})
    with pytest.raises(ValueError, match=r"state_dict lacks 1 weights of the side network, first side_up"):
        model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if not k.endswith("side_up")})
    with pytest.raises(ValueError, match="adapters are safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"call model.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_the_stock_trainer_trains_and_saves_it(tmp_path: Path) -> None:
    model = ladder_model("xladder").train()
    samples = [{"input_ids": row, "labels": row} for row in batch(8, 10)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, save_steps=3, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    packed = model.backbone.blocks[0].query.weight.packed.clone()
    Trainer(model, arguments, train_dataset=samples).train()
    loaded = LadderForCausalLM.from_pretrained(tmp_path / "checkpoint-3", backbone=tiny_backbone())
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, ladder_model("xladder")(IDS).logits)
    assert torch.equal(model.backbone.blocks[0].query.weight.packed, packed)


def test_another_backbone_is_refused(folder: Path, tmp_path: Path) -> None:
    other = load_backbone(tiny_checkpoint(tmp_path, "qwen2", seed=1))
    with pytest.raises(
        ValueError, match=r"trained beside the backbone .*fingerprint [0-9a-f]{12}\), but got .*train anew"
    ):
        LadderForCausalLM.from_pretrained(folder, backbone=other)
    dense = tiny_backbone(quantize=False)
    with pytest.raises(ValueError, match=r"NF4 with double quantization, .* but got .*\(not quantized,"):
        LadderForCausalLM.from_pretrained(folder, backbone=dense)


def test_another_configuration_is_refused_and_changes_nothing(folder: Path) -> None:
    model = ladder_model(merge="sum", seed=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="not the configuration of this side network: merge is 'lst', not 'sum'; seed is"
    ):
        load_adapter(folder, model.side_network, model.backbone)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_NAME)
        change(weights)
        save_file(weights, folder / WEIGHTS_NAME)

    return apply


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(lambda w: w.pop("layers.0.qkv")), r"ladder.safetensors: 1 missing tensors, first layers.0.qkv"),
        (rewrite(lambda w: w.update(extra=torch.ones(1))), r"ladder.safetensors: 1 unexpected tensors, first extra"),
        (
            rewrite(lambda w: w.update(side_up=w["side_up"].T.contiguous())),
            r"ladder.safetensors: tensor side_up must be F32 of shape \(64, 32\), got F32 of shape \(32, 64\)",
        ),
        (
            rewrite(lambda w: w.update(side_up=w["side_up"].bfloat16())),
            r"tensor side_up must be F32 of shape \(64, 32\), got BF16 of shape \(64, 32\)",
        ),
        (rewrite(lambda w: w["side_up"][3].fill_(float("nan"))), "tensor side_up holds NaN or infinity"),
        (rewrite(lambda w: w["taps.1.gate_logit"].fill_(float("inf"))), "tensor taps.1.gate_logit holds NaN"),
        (truncate, "ladder.safetensors: not a complete safetensors file"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "ladder.safetensors: no such file"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        LadderForCausalLM.from_pretrained(folder, backbone=tiny_backbone())


def test_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    model, contents = trained(ladder_model()), set()
    for _ in range(16):
        model.save_pretrained(tmp_path)
        contents.add((tmp_path / WEIGHTS_NAME).read_bytes())
    assert len(contents) == 1


def test_no_flipped_bit_and_no_cut_loads_as_other_weights(tmp_path: Path) -> None:
    """safetensors itself would load the first kind. What is not refused holds the weights that were saved."""
    model = trained(ladder_model())
    model.save_pretrained(tmp_path)
    path, whole = tmp_path / WEIGHTS_NAME, (tmp_path / WEIGHTS_NAME).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    places = [generator.randrange(header) for _ in range(40)] + [
        generator.randrange(header, len(whole)) for _ in range(40)
    ]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << generator.randrange(8)]) + whole[at + 1 :] for at in places]
    damaged += [whole[: generator.randrange(len(whole))] for _ in range(20)] + [whole + b"\0", b""]
    expected, refused = model.side_network.state_dict(), 0
    for content in damaged:
        path.write_bytes(content)
        other = ladder_model().side_network
        try:
            load_adapter(tmp_path, other, tiny_backbone())
        except ValueError as error:
            assert WEIGHTS_NAME in str(error)
            refused += 1
            continue
        assert all(torch.equal(weight, expected[name]) for name, weight in other.state_dict().items())
    assert refused >= 90
    path.write_bytes(damaged[-30])
    with pytest.raises(ValueError, match=r"weights have the sha256 .*, those saved had .* is damaged; copy it again"):
        load_adapter(tmp_path, ladder_model().side_network, tiny_backbone())


def test_adapters_from_before_there_was_a_sha256_load(folder: Path) -> None:
    expected = load_file(folder / WEIGHTS_NAME)
    save_file(expected, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    loaded = LadderForCausalLM.from_pretrained(folder, backbone=tiny_backbone()).side_network.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / CONFIG_NAME).read_text())
        change(content)
        (folder / CONFIG_NAME).write_text(json.dumps(content))

    return apply


def replace(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG_NAME).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG_NAME).unlink(), "no such file; expected an adapter folder written by"),
        (replace("{"), "ladder_config.json: not valid JSON"),
        (replace("[" * 100_000), "ladder_config.json: not valid JSON"),
        (replace("\xff"), "ladder_config.json: "),
        (replace("[]"), "format_version must be 1, got None"),
        (replace(" " * (1 << 20) + "{}"), "1048578 bytes, expected at most 1048576"),
        (edit(lambda c: c.update(format_version=2)), "format_version must be 1, got 2"),
        (edit(lambda c: c.update(auto_map={})), "expected an object with the keys .*got .*auto_map"),
        (edit(lambda c: c.pop("backbone")), "expected an object with the keys"),
        (edit(lambda c: c.update(backbone=[])), "expected an object with the keys .*got list"),
        (edit(lambda c: c["backbone"].pop("source")), "expected an object with the keys .*source"),
        (edit(lambda c: c["backbone"].update(source=3)), "source must be a str, got 3"),
        (edit(lambda c: c["backbone"].update(quantized=1)), "quantized must be a bool, got 1"),
        (edit(lambda c: c["backbone"].update(dtype="load")), "dtype must name a torch dtype, got 'load'"),
        (edit(lambda c: c["ladder"].update(side_dim=10**12)), r"unknown ladder configuration keys \['side_dim'\]"),
        (
            edit(lambda c: c["ladder"].update(num_side_layers=10**12)),
            "num_side_layers must be an integer from 1 to 1024",
        ),
        (edit(lambda c: c.update(ladder=7)), "a ladder configuration is a JSON object, got int"),
    ],
)
def test_damaged_configurations_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_a_backbone_that_is_gone_is_an_error_that_names_it(folder: Path) -> None:
    edit(lambda c: c["backbone"].update(source="/nowhere/at-all"))(folder)
    with pytest.raises(
        ValueError,
        match=r"backbone /nowhere/at-all of .*could not be loaded; if it lies elsewhere, pass backbone= .--model",
    ):
        LadderForCausalLM.from_pretrained(folder)


def test_a_backbone_that_was_moved_is_found_where_one_says_it_is(tmp_path: Path) -> None:
    """As on another machine: the record's absolute path is only where it was."""
    before, after = tiny_checkpoint(tmp_path, "llama2"), tmp_path / "moved"
    model = trained(ladder_model(backbone=load_backbone(before)))
    model.save_pretrained(tmp_path / "adapter")
    before.rename(after)
    with pytest.raises(ValueError, match=f"{before} of the adapter .* pass backbone="):
        LadderForCausalLM.from_pretrained(tmp_path / "adapter")
    moved = LadderForCausalLM.from_pretrained(tmp_path / "adapter", backbone=after)
    assert torch.equal(moved(IDS).logits, model(IDS).logits)


def test_a_folder_with_another_model_is_not_overwritten(tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path, "llama2")
    before = {file.name: file.read_bytes() for file in backbone.iterdir()}
    with pytest.raises(ValueError, match="holds another model"):
        ladder_model().save_pretrained(backbone)
    assert {file.name: file.read_bytes() for file in backbone.iterdir()} == before


@pytest.mark.parametrize("dtype", ["fp32", "Tensor"])
def test_a_dtype_that_is_none_is_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="name of a torch dtype"):
        LadderForCausalLM.from_pretrained(folder, backbone=checkpoint_folder(), dtype=dtype)
