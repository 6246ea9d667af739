"""Host memory: how much there is, pinning it, and the order of copies and computation on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ladders import checkpoint_folder, tiny_backbone

from engine.backbone import host_memory, load_backbone
from engine.backbone.layout import pack, packed_nbytes
from engine.backbone.residency import StreamCopier


def test_too_little_host_memory_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * packed_nbytes(tiny_backbone().blocks[0])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"packed layers need 0\.00 GB of host memory.* pass packed_cache="):
        load_backbone(checkpoint_folder(), dtype=torch.float32, residency="host")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed)
    load_backbone(checkpoint_folder(), dtype=torch.float32, residency="host")


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 3_000_000 * 1024), ("1000000000", 10**9 - (700_000_000 - 200_000_000)), ("5", 0)]
)
def test_available_memory_is_the_lesser_of_system_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    group = tmp_path / "cgroup/job"
    group.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:    3000000 kB\n")
    (tmp_path / "self/cgroup").write_text("0::/job\n")
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text("700000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 200000000\n")
    monkeypatch.setattr(host_memory, "_PROC", tmp_path)
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    assert host_memory.available_bytes() == expected


def test_memory_is_unlimited_where_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_PROC", tmp_path)
    assert host_memory.available_bytes() is None
    host_memory.check_available(10**18)


class Runtime:
    """A CUDA runtime that pins `limit` buffers and refuses the next."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pinned = limit, dict[int, int]()

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        if len(self.pinned) == self.limit:
            return 2
        self.pinned[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.pinned[pointer]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return "out of memory"


def test_memory_that_cannot_be_pinned_is_streamed_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, cpu = Runtime(2), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    buffers = [pack(block).buffer for block in tiny_backbone().blocks[:3]]
    with pytest.warns(RuntimeWarning, match=r"only 0\.00 of 0\.00 GB .*cudaHostRegister: out of memory.*pageable"):
        pinned = host_memory.pin(buffers, cpu)
    assert runtime.pinned == {buffer.data_ptr(): buffer.nbytes for buffer in buffers[:2]}
    host_memory.unpin(pinned, cpu)
    assert not runtime.pinned


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a CUDA device that records and does nothing."""
    events: list[str] = []
    names = iter(["copied0", "copied1", "computed0", "computed1"])

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            events.append(f"{self.name} waits for {event.name}")

        def __enter__(self) -> None:
            events.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            pass

    class Event:
        def __init__(self) -> None:
            self.name = next(names)

        def record(self, stream: Stream) -> None:
            events.append(f"{self.name} on {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield events


def test_events_order_copies_and_computation(log: list[str]) -> None:
    copier = StreamCopier(torch.device("cuda"), 2)
    assert log == ["computed0 on compute", "computed1 on compute"]
    target: Any = SimpleNamespace(
        record_stream=lambda stream: log.append(f"kept for {stream.name}"),
        copy_=lambda source, non_blocking: log.append(f"copy {source} {non_blocking=}"),
    )
    log.clear()
    source: Any = "layer"
    copier.copy(1, source, target)
    copier.wait(1)
    copier.release(1)
    assert log == [
        "kept for copies",
        "copies waits for computed1",
        "on copies",
        "copy layer non_blocking=True",
        "copied1 on copies",
        "compute waits for copied1",
        "computed1 on compute",
    ]


def test_a_captured_graph_is_refused(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    copier = StreamCopier(torch.device("cuda"), 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.* residency='device'"):
        copier.wait(0)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        copier.copy(0, torch.empty(1), torch.empty(1))
