"""The `ladder` command: the main job, its files, and errors as one message with an exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from typer.testing import CliRunner, Result

from engine import LadderForCausalLM
from engine.cli import app
from engine.quickstart import defaults
from engine.training.finetune import check_output, training_arguments
from engine.training.options import TrainOptions, read_options_file, with_values
from engine.training.summary import PeakMemory, StepClock

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(6) for j in range(4)]
SUMMARY_KEYS = [
    "heldout_loss_before",
    "heldout_loss_after",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_mib",
    "trainable_parameters",
    "preset",
    "device",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "llama2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in PAIRS))
    return path


@pytest.fixture
def quickstart(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny stand-ins for the shipped assets."""
    monkeypatch.setattr(defaults, "backbone_path", lambda: str(checkpoint))
    monkeypatch.setattr(defaults, "train_path", lambda: str(data))
    monkeypatch.setattr(defaults, "heldout_path", lambda: str(data))
    monkeypatch.setattr("engine.training.finetune.SHOWN_NEW_TOKENS", 4)


def ladder(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failure(*arguments: object, code: int = 2) -> str:
    result = ladder(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    return result.output


def test_quickstart(quickstart: None, tmp_path: Path) -> None:
    """Everything that the run promises to print and to write, and the adapter gives the same logits when reloaded."""
    folder = tmp_path / "out"
    result = ladder("train", "--steps", 3, "--output", folder, "--preset", "xladder")
    assert result.exit_code == 0, result.output
    for text in (
        "Backbone      the shipped quickstart model:",
        "Side network  xladder:",
        "0 plus 0 is [[0<eos>]]",
        "Held-out loss before training:",
        "Held-out sample 1",
        "Held-out sample 13",
        "reference:",
        "generated:",
        "tokens/s, 3 steps in",
        "MiB resident memory growth",
        f"ladder generate --adapter {folder}",
    ):
        assert text in result.output, text
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS
    assert summary["steps"] == 3 and summary["preset"] == "xladder" and summary["device"] == "cpu"
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    assert summary["tokens_per_second"] > 0 and summary["peak_mib"] >= 0
    model = LadderForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == summary["trainable_parameters"]
    assert model.ladder_config.reduction_factor == defaults.QUICKSTART.reduction_factor


def test_a_training_that_was_cut_short_goes_on(quickstart: None, tmp_path: Path) -> None:
    """Ctrl-C in the command leaves a checkpoint and status 130; --resume ends as the run that was left alone."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from engine.cli import app\n"
        "from engine.training.trainer import LadderTrainer\n"
        "stock = LadderTrainer.training_step\n"
        "def step(self, *arguments):\n"
        "    if self.state.global_step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return stock(self, *arguments)\n"
        "LadderTrainer.training_step = step\n"
        "app()\n"
    )
    model, data = defaults.backbone_path(), defaults.train_path()
    same = ["train", "--model", model, "--data", data, "--eval-data", data, "--steps", "4", "--batch-size", "1"]
    same += ["--gradient-accumulation", "1", "--reduction-factor", "2", "--max-length", "64"]
    run, environment = [*same, "--output", str(tmp_path / "cut")], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *run], capture_output=True, text=True, env=environment)
    assert done.returncode == 130, done.stderr
    assert "SIGINT received: training stops after this step with a checkpoint" in done.stderr
    assert "holds a training that did not end (step 3); go on with --resume" in failure(*run)
    assert ladder(*run, "--resume").exit_code == 0
    assert ladder(*same, "--output", tmp_path / "whole").exit_code == 0
    cut, whole = (
        LadderForCausalLM.from_pretrained(tmp_path / name).side_network.state_dict() for name in ("cut", "whole")
    )
    for name, weight in whole.items():
        assert torch.equal(cut[name], weight), name
    assert "holds a finished run" in failure(*run, "--resume")
    assert "give one of them" in failure(*run, "--resume", "--overwrite")
    (tmp_path / "cut" / "summary.json").unlink()  # as if it had been killed before the last file
    assert "holds a training that did not end (step 4)" in failure(*run)
    assert ladder(*run, "--resume").exit_code == 0
    before = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
    assert ladder(*run, "--overwrite", "--steps", 1).exit_code == 0
    assert before == {"checkpoint-3", "checkpoint-4"}
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-1"}


def test_leaner_policies(quickstart: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Taps, head, packing and optimizer as asked for, in the plan and in what is trained; the longest rows tried."""
    folder, lean = tmp_path / "out", ("--taps", "int8", "--head-dtype", "int8", "--packing", "--longest-first")
    with caplog.at_level("INFO", "engine.training.longest_batch"):
        result = ladder("train", "--steps", 1, "--output", folder, *lean)
    assert "the longest batches fit" in caplog.text
    assert result.exit_code == 0, result.output
    assert "taps as int8; head int8; embedding on the host; adamw" in result.output
    assert re.search(r"Packed        24 samples in \d rows of .* full", result.output)
    assert LadderForCausalLM.from_pretrained(folder).backbone.head_dtype == "int8"
    arguments = training_arguments(TrainOptions(optimizer="adamw_8bit", taps="none"))
    assert (arguments.optim, arguments.taps) == ("adamw_torch_8bit", "none")


def test_shipped_quickstart(tmp_path: Path) -> None:
    """The assets in the package, found without arguments, improve within a few steps."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(Path(defaults.heldout_path()).read_text(encoding="utf-8").splitlines()[:8]))
    result = ladder("train", "--steps", 4, "--eval-data", heldout, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    # A backbone that knew nothing would start at ln(4096) = 8.3.
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] < 7


def test_same_seed_gives_the_same_summary_and_another_seed_another(quickstart: None, tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        ladder("train", "--steps", 2, "--output", tmp_path / str(number), "--seed", seed)
        losses.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["heldout_loss_after"])
    assert losses[0] == losses[1] != losses[2]


def test_a_sweep(quickstart: None, tmp_path: Path) -> None:
    """Every combination has an adapter; what is finished or unfinished is kept unless asked; one pass for all."""
    output = tmp_path / "sweep"
    common = ("--steps", 4, "--output", output, "--save-steps", 2, "--gradient-accumulation", 1)
    vary = ("--vary", "learning-rate=1e-3,3e-3", "--vary", "preset=ladder,xladder")
    done = ladder("sweep", *common, *vary)
    assert done.exit_code == 0, done.output
    result = json.loads((output / "sweep.json").read_text())
    names = [
        f"{n}-learning_rate={lr},preset={preset}"
        for n, (lr, preset) in enumerate((lr, preset) for lr in (0.001, 0.003) for preset in ("ladder", "xladder"))
    ]
    assert [row["name"] for row in result["members"]] == names and result["best"] in names
    assert f"Best          {result['best']}" in done.output and "Memory plan of 4 side networks" in done.output
    told = ladder("generate", "--adapter", output / result["best"], "--prompt", "def f(", "--max-new-tokens", 3)
    assert told.exit_code == 0, told.output
    assert "holds a finished sweep (sweep.json)" in failure("sweep", *common, *vary)
    (output / "sweep.json").unlink()
    for name in names[1:]:
        (output / name / "member.json").unlink()
    assert "holds a sweep that did not end" in failure("sweep", *common, *vary)
    resumed = ladder("sweep", *common, *vary, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((output / "sweep.json").read_text())["best"] == result["best"]
    members = tmp_path / "members.yaml"
    members.write_text("- name: small\n  reduction_factor: 4\n- seed: 3\n")
    listed = ladder("sweep", *common, "--members", members, "--overwrite")
    assert listed.exit_code == 0 and (output / "small" / "ladder.safetensors").exists(), listed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a sweep needs --vary NAME=VALUE,VALUE"),
        (("--vary", "seed"), "--vary seed: expected NAME=VALUE,VALUE"),
        (("--vary", "seed=1,,2"), "--vary seed=1,,2: expected"),
        (("--vary", "learning_rate=[1"), "--vary learning_rate=[1: expected plain values"),
        (("--vary", "seed=!!python/object:os.system"), "expected plain values"),
        (("--vary", "seed=1", "--vary", "seed=2"), "--vary seed is given twice"),
        (("--vary", "batch_size=1,2"), "'batch_size' unknown; members may differ in preset, reduction_factor"),
        (("--vary", "learning_rate=-1"), "learning_rate must be a finite number of at least 0, got -1"),
        (("--members", "no.yaml"), "no.yaml: cannot be read"),
        (("--members", "bad.yaml"), "bad.yaml: is not valid YAML"),
        (("--members", "text.yaml"), "expected a list of one mapping per side network"),
        (("--members", "text.yaml", "--vary", "seed=1"), "give one of them"),
    ],
)
def test_sweep_faults(
    quickstart: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("[")
    Path("text.yaml").write_text("hello")
    assert message in failure("sweep", *arguments)


def test_own_data_config_file_generate_and_info(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {checkpoint}\ndata: {data}\noutput: {tmp_path / 'unused'}\nlearning-rate: 3e-3\nsteps: 2\n"
        "reduction_factor: 2\nbatch-size: 4\ngradient_accumulation_steps: 1\nmax_length: 64\n"
    )
    folder = tmp_path / "out"
    result = ladder("train", "--config", config, "--output", folder, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "23 samples" in result.output and "held out: 1 samples, drawn from the data with seed 0" in result.output
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert not (tmp_path / "unused").exists()

    result = ladder("generate", "--adapter", folder, "--prompt", "1 plus 2 is ", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    chat = ladder("generate", "--adapter", folder, "--prompt", "hello", "--max-new-tokens", 2, "--chat")
    assert chat.exit_code == 0, chat.output

    result = ladder("info", "--adapter", folder)
    assert result.exit_code == 0, result.output
    assert "reduction_factor=2" in result.output and "native library" in result.output and "torch 2." in result.output
    result = ladder("info", "--model", checkpoint)
    assert result.exit_code == 0, result.output
    assert "family          llama" in result.output and "4 blocks, width 64" in result.output
    assert "native library" in ladder("info").output


def test_finished_runs_are_kept_unless_asked(quickstart: None, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert ladder("train", "--steps", 1, "--output", folder).exit_code == 0
    first = (folder / "ladder.safetensors").read_bytes()
    message = failure("train", "--steps", 1, "--output", folder, "--seed", 5)
    assert "holds a finished run (summary.json, ladder_config.json)" in message and "--overwrite" in message
    assert (folder / "ladder.safetensors").read_bytes() == first
    assert ladder("train", "--steps", 1, "--output", folder, "--seed", 5, "--overwrite").exit_code == 0
    assert (folder / "ladder.safetensors").read_bytes() != first
    assert (folder / "notes.txt").read_text() == "mine"


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out: is a file; choose a folder"):
        check_output(tmp_path / "out", overwrite=True)


def test_user_errors_are_one_message(quickstart: None, tmp_path: Path, checkpoint: Path) -> None:
    out = ("--output", tmp_path / "out")
    assert "error: unknown preset 'rope'; expected one of ladder, xladder, lst, qst" in failure(
        "train", "--preset", "rope", *out
    )
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 3}\n')
    message = failure("train", "--data", bad, *out)
    assert f"error: {bad}, line 2, field `text`: expected text, got a number" in message
    bad.write_text('{"text": "x"}\n')
    assert "holds one record; add more, or name held-out data with --eval-data" in failure("train", "--data", bad, *out)
    assert "error: " in failure("train", "--model", tmp_path / "nowhere", *out)
    assert "`steps` is 0; expected at least 1" in failure("train", "--steps", 0, *out)
    assert "no such file; expected an adapter folder" in failure("generate", "--adapter", tmp_path, "--prompt", "x")
    assert "give one of them" in failure("info", "--model", checkpoint, "--adapter", tmp_path)
    failure("train", "--stepps", 1)
    assert not (tmp_path / "out").exists()


CONFIG_FAULTS = {
    "unknown": ("run.yaml", "steppes: 3", r"run\.yaml: unknown option `steppes`; known: preset, model, data"),
    "config itself": ("run.yaml", "config: other.yaml", "unknown option `config`"),
    "type": ("run.yaml", "steps: many", "option `steps` is 'many'; expected a whole number"),
    "boolean": ("run.yaml", "steps: true", "option `steps` is True; expected a whole number"),
    "float": ("run.json", '{"learning_rate": "fast"}', "`learning_rate` is 'fast'; expected a number"),
    "text": ("run.json", '{"preset": 3}', "`preset` is 3; expected text"),
    "list": ("run.yaml", "- steps", "expected `name: value` pairs, got list"),
    "yaml": ("run.yaml", "steps: [", r"run\.yaml: is not valid YAML"),
    "json": ("run.json", "{", r"run\.json: is not valid JSON"),
    "twice": ("run.yaml", "eval-data: a\neval_data: b", "option `eval_data` is given twice"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_file_faults(tmp_path: Path, fault: str) -> None:
    name, text, message = CONFIG_FAULTS[fault]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options_file(tmp_path / name)


def test_config_files_of_both_kinds_and_their_precedence(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("learning-rate: 1e-3\nseed: 7\noverwrite: true\npreset:\n")
    (tmp_path / "run.json").write_text('{"learning_rate": 1, "eval-data": "x"}')
    yaml_values = read_options_file(tmp_path / "run.yml")
    assert yaml_values == {"learning_rate": 1e-3, "seed": 7, "overwrite": True, "preset": None}
    assert read_options_file(tmp_path / "run.json") == {"learning_rate": 1.0, "eval_data": "x"}
    options = with_values(TrainOptions(seed=3), yaml_values)
    assert (options.learning_rate, options.seed, options.preset) == (1e-3, 7, "ladder")
    with pytest.raises(ValueError, match="cannot be read"):
        read_options_file(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("save_steps", 0),
        ("batch_size", 0),
        ("reduction_factor", 0),
        ("max_length", 1),
        ("learning_rate", 0.0),
        ("seed", -1),
        ("taps", "disk"),
        ("head_dtype", "fp8"),
        ("optimizer", "sgd"),
    ],
)
def test_option_ranges(name: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}; expected"):
        TrainOptions(**{name: value})


def test_import_and_help_are_light() -> None:
    """Neither `import engine` nor the command's help loads torch."""
    code = (
        "import sys, engine\n"
        "assert engine.__version__ and 'LadderTrainer' in dir(engine)\n"
        "from typer.testing import CliRunner\n"
        "from engine.cli import app\n"
        "for arguments in (['--help'], ['train', '--help'], ['--version']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'ladder_kernels'} & set(sys.modules), sorted(sys.modules)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_name_of_the_package() -> None:
    import engine

    with pytest.raises(AttributeError, match="module 'engine' has no attribute 'Trainer'"):
        _ = engine.Trainer


def test_clock_counts_only_between_count_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("engine.training.summary.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    now[0] = 5.0
    clock.count(10)
    now[0] = 7.0
    with clock.stopped():
        now[0] = 100.0
    clock.count(5)
    now[0] = 101.0
    assert (clock.seconds, clock.tokens) == (3.0, 15)


def test_peak_memory_sees_an_allocation() -> None:
    memory = PeakMemory("cpu")
    block = torch.ones(64, 1 << 20, dtype=torch.uint8)
    assert block.sum() == 64 << 20
    assert memory.mib() >= 50
