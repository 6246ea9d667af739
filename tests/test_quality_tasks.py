"""Tasks and backbones of the quality benchmark: what is learned, no leak, right answers, the cache of backbones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.quality import backbones
from benchmarks.quality.backbones import SHIPPED, SIZES, Size, backbone_folder
from benchmarks.quality.sources import PACKAGES, package_files
from benchmarks.quality.tasks import TASKS, Sample, TaskData
from benchmarks.quality.tasks.classify import GIVEAWAY, LABELS, split_functions
from benchmarks.quality.tasks.hops import hops_steps_task
from benchmarks.quality.tasks.prose import split_documents
from engine.quickstart import pretrain
from engine.quickstart.corpus import SourceFile, is_heldout, standard_library
from engine.quickstart.defaults import backbone_path

TOY = Size("toy", 32, 1, 1, 1, 32, 64, tokens=2 * 16 * pretrain.CONTEXT)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(backbone_path())


@pytest.fixture(scope="module")
def data(tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskData]:
    """Every task with seed 0, made once, less of it than the benchmark takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.quality.tasks.prose.MANUALS", ("networkx",))
        patch.setattr("benchmarks.quality.tasks.classify.TRAIN_PER_CLASS", 60)
        patch.setattr("benchmarks.quality.tasks.hops.TRAIN_ROWS", 500)
        return {name: task(tokenizer, 0) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def library() -> list[SourceFile]:
    return standard_library()


def learned(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != -100]


@pytest.mark.parametrize("name", TASKS)
def test_rows_fit_and_are_learned_where_they_say(name: str, data: dict[str, TaskData]) -> None:
    for sample in [*data[name].train, *data[name].heldout]:
        assert len(sample.input_ids) == len(sample.labels) <= 256
        assert sample.labels[0] == -100 and learned(sample), "the first token cannot be predicted, others have to be"
        assert all(label in (-100, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_only_tasks_with_right_answers_have_examples(name: str, data: dict[str, TaskData]) -> None:
    assert len(data[name].train) >= 300
    assert 64 <= len(data[name].heldout) <= 300, "evaluation has to take seconds"
    assert bool(data[name].examples) == (name in ("hops", "hops_steps", "classify"))


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_data_again_and_never_moves_what_is_held_out(
    name: str, data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.tasks.hops.TRAIN_ROWS", 100)  # the first of the 500
    again = TASKS[name](tokenizer, 0)
    assert again.train == data[name].train[: len(again.train)]
    assert (again.heldout, again.examples) == (data[name].heldout, data[name].examples)
    other = TASKS[name](tokenizer, 1)
    assert other.train != data[name].train
    assert (other.heldout, other.examples) == (data[name].heldout, data[name].examples)


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"hops", "hops_steps"}))  # whose 126 prompts are all trained on
def test_no_heldout_row_is_trained_on(name: str, data: dict[str, TaskData]) -> None:
    trained = {tuple(sample.input_ids) for sample in data[name].train}
    assert not [sample for sample in data[name].heldout if tuple(sample.input_ids) in trained]


def test_prose_shares_no_paragraph_with_training_and_its_topics_with_no_backbone(library: list[SourceFile]) -> None:
    train, heldout = ({p for text in part for p in text.strip().split("\n\n")} for part in split_documents())
    assert not train & heldout
    assert not [file.path for file in library if "pydoc_data" in file.path.parts]


def test_classification_shares_no_function_with_training_and_no_name_tells(data: dict[str, TaskData]) -> None:
    train, heldout = split_functions()  # as in `data`, which made them
    assert not train.keys() & heldout.keys()
    for functions in (train, heldout):
        counts = [list(functions.values()).count(package) for package in PACKAGES]
        assert len(set(counts)) == 1, f"classes are not equally frequent: {counts}"
        assert not [code for code in functions if GIVEAWAY.search(code)]


def test_a_function_whose_head_is_trained_on_is_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is what is shown: names replaced, then cut."""
    names = [f"numpy/file{number}" for number in range(100)]
    sides = next(name for name in names if not is_heldout(name)), next(name for name in names if is_heldout(name))
    head = 'def same(x):\n    """Say it."""\n    ' + "x = numpy.tan(x)\n    " * 30
    tails = ("return np.sin(x)\n", "return x\n")
    files = [SourceFile(Path(name), name, False, head + tail) for name, tail in zip(sides, tails, strict=True)]
    monkeypatch.setattr(
        "benchmarks.quality.tasks.classify.package_files", lambda package: files if package == "numpy" else []
    )
    train, heldout = split_functions.__wrapped__()
    assert list(train.values()) == ["numpy"] and not heldout


def test_the_label_is_one_token_and_nothing_else_is_learned(
    data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase
) -> None:
    labels = {tokenizer.convert_tokens_to_ids(label.replace(" ", "Ġ")) for label in LABELS.values()}
    assert len(labels) == len(PACKAGES)
    for sample in data["classify"].train:
        assert sample.labels[-1] in labels and set(sample.labels[:-1]) == {-100}


@pytest.mark.parametrize("name", ["hops", "hops_steps"])
def test_answers_follow_the_cup(name: str, data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase) -> None:
    """Solved the other way round: all three cups are moved, and the marked one is looked for at the end."""
    for example in data[name].examples:
        problem, _, stride = tokenizer.decode(example.prompt).removesuffix(" =").partition(" : ")
        start, *swaps = problem.split()
        answer, stride, hops = tokenizer.decode(example.answer).split(), int(stride), len(swaps) // 2
        cups = {place: place == start for place in "abc"}
        for done, (first, second) in enumerate(zip(swaps[::2], swaps[1::2], strict=True), 1):
            cups[first], cups[second] = cups[second], cups[first]
            if done % stride == 0:
                assert cups[answer[done // stride - 1]]
        assert len(answer) == hops // stride
        assert example.group == f"hops={hops}" + (f",written={len(answer)}" if name == "hops_steps" else "")


def test_a_row_of_hops_is_learned_at_its_answers_only(
    data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in data["hops_steps"].train[:50]:
        lines = tokenizer.decode(sample.input_ids).strip().split("\n")
        answers = [word for line in lines for word in line.partition("=")[2].split()]
        assert tokenizer.decode(learned(sample)).split() == answers


def test_a_tokenizer_that_splits_a_digit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"' a' is 2 tokens of this tokenizer"):
        hops_steps_task(tiny_tokenizer(), 0)


def test_every_size_has_about_the_parameters_of_its_name() -> None:
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(size.pretraining().config)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(float(name[:-1]), rel=0.03)


def test_the_shipped_size_is_what_is_shipped() -> None:
    folder = backbone_folder(SHIPPED, Path("never made"))
    backbones._check(folder, SIZES[SHIPPED].pretraining())
    assert json.loads((folder / "training.json").read_text())["tokens"] == SIZES[SHIPPED].tokens


def test_only_backbones_larger_than_the_shipped_one_read_packages(
    library: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "PACKAGES", ("networkx",))
    monkeypatch.setattr(backbones, "standard_library", lambda: library[:3])
    assert backbones._files(SIZES["1.3M"]) == library[:3]
    assert backbones._files(SIZES["12M"]) == [*library[:3], *package_files("networkx")]


@pytest.fixture
def toy(library: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> list[SourceFile]:
    """A size that is pretrained in a moment, on a few files."""
    files = [file for file in library if len(file.text) < 4000][:20]
    monkeypatch.setitem(SIZES, "toy", TOY)
    monkeypatch.setattr(backbones, "_files", lambda size: files)
    monkeypatch.setattr(pretrain, "heldout_loss", lambda model, stream: 0.0)
    return files


def test_a_backbone_is_made_once_and_the_same_each_time(
    toy: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    folders = [backbone_folder("toy", tmp_path / name) for name in "ab"]
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert AutoTokenizer.from_pretrained(folders[0]).get_vocab() == tokenizer.get_vocab()
    monkeypatch.setattr(backbones, "pretrain", None)
    assert backbone_folder("toy", tmp_path / "a") == folders[0]


def test_a_run_that_was_cut_off_leaves_nothing_that_is_taken(
    toy: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pretrain.save

    def cut_off(*args: object) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        backbone_folder("toy", tmp_path)
    (tmp_path / ".toy-killed" / "toy").mkdir(parents=True)  # as a killed process leaves it
    assert not (tmp_path / "toy").exists()
    monkeypatch.setattr(pretrain, "save", save)
    assert json.loads((backbone_folder("toy", tmp_path) / "training.json").read_text())["steps"] == 2


def test_another_backbone_under_the_name_is_refused(
    toy: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone_folder("toy", tmp_path)
    monkeypatch.setitem(SIZES, "toy", Size("toy", 32, 1, 1, 1, 32, 64, tokens=TOY.tokens * 2))
    with pytest.raises(ValueError, match=r"after 2 steps; expected .* after 4: delete the folder"):
        backbone_folder("toy", tmp_path)
    with pytest.raises(ValueError, match=r"no backbone of size '7B'; expected one of 0\.8M, 1\.3M"):
        backbone_folder("7B", tmp_path)


def test_pretraining_never_reads_a_heldout_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    read: list[list[str]] = []
    stream = pretrain.token_stream

    def recorded(files: list[SourceFile], *args: object) -> object:
        read.append([file.module for file in files])
        return stream(files, *args)

    monkeypatch.setattr(pretrain, "token_stream", recorded)
    monkeypatch.setattr(pretrain, "optimized", lambda *args: iter(()))
    package = list(package_files("networkx"))[:60]
    pretrain.pretrain(tmp_path, TOY.pretraining(), package, tokenizer)
    trained, heldout = read
    assert trained and heldout and sorted([*trained, *heldout]) == sorted(file.module for file in package)
    assert not any(map(is_heldout, trained)) and all(map(is_heldout, heldout))
