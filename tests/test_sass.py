"""Every GPU kernel, compiled for every architecture: no spills, within limits and budgets, no worse than committed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import sass
from benchmarks.sass_listing import (
    count_local_accesses,
    count_lookups,
    family,
    global_bytes_per_thread,
    read_main_loop,
    read_usage,
    tensor_fma_per_warp,
)
from benchmarks.sass_model import (
    CARDS,
    Work,
    blackwell_tensor_fma,
    cycles,
    lookup_wavefronts,
    predicted_bound,
    table_shape,
)

REPOSITORY = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

LISTING = """
\t.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   LDS R8, [R6] ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0040*/              @!P0 HMMA.1688.F32 R12, R4, R8, R12 ;
        /*0050*/               @P1 LDG.E.U8 R9, [R2.64] ;
        /*0060*/                   NOP ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
        /*0080*/                   STG.E [R2.64], R12 ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   STL [R1], R3 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP ;
"""


def row(**changes: str) -> sass.Row:
    values = dict.fromkeys(sass.COLUMNS, "") | {
        "name": "op.kernel", "architecture": "86", "triton": "1", "key": "k", "uses_tensor_cores": "yes",
        "spill_bytes": "0", "local_accesses": "0", "shared_bytes": "101376", "loop_instructions": "100",
        "loop_tensor": "64", "instructions_per_weight": "5.20",
    }  # fmt: skip
    return values | changes


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=inherited | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[sass.Row]:
    """All shipped kernels: those changed since the committed rows, and one of each kernel, are compiled."""
    out = tmp_path_factory.mktemp("sass") / "sass.csv"
    result = python("-m", "benchmarks", "sass", "--out", str(out), "--known", str(sass.SASS_CSV))
    assert result.returncode in (0, sass.EXIT_VIOLATION), result.stderr
    return sass.read_rows(out)


@needs_triton
def test_every_shipped_kernel_keeps_the_rules(rows):
    assert rows
    assert [problem for row in rows for problem in sass.violations(row)] == []


@needs_triton
def test_no_main_loop_grew(rows):
    assert sass.regressions(rows, sass.read_rows(sass.SASS_CSV)) == []


@needs_triton
def test_committed_rows_are_those_of_today(rows):
    """Run `python -m benchmarks sass` after a change of a kernel."""
    committed = sass.read_rows(sass.SASS_CSV)
    if not any(row["triton"] == sass.triton_version() for row in committed):
        pytest.skip("no rows of this Triton are committed")
    assert [row for row in committed if row["triton"] == sass.triton_version()] == rows


@needs_triton
def test_a_bad_kernel_is_found():
    code = (
        "import json, sys; sys.path.insert(0, 'tests'); from benchmarks.sass_compile import measure; "
        "import faulty_kernels as f; print(json.dumps([measure(spec, 86) for spec in (f.SPILLING, f.OVERSIZED)]))"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    spilled, oversized = (row(instructions_per_weight="") | measured for measured in json.loads(result.stdout))
    assert int(spilled["spill_bytes"]) > 0 and int(spilled["local_accesses"]) > 0
    assert [text for text in sass.violations(spilled) if "spills" in text]
    assert int(oversized["shared_bytes"]) > CARDS[86].shared_bytes
    assert sass.violations(oversized) == [
        f"op.kernel on sm_86: {oversized['shared_bytes']} bytes of shared memory, expected at most 101376"
    ]
    assert oversized["loop_tensor"] == "128" and oversized["bound"] == "tensor pipe"


def test_rules():
    assert sass.violations(row()) == []
    assert sass.violations(row(architecture="80", instructions_per_weight="99")) == []
    assert "spills" in sass.violations(row(spill_bytes="8"))[0]
    assert "spills" in sass.violations(row(local_accesses="1"))[0]
    assert "shared memory" in sass.violations(row(shared_bytes="101377"))[0]
    assert "tensor-core" in sass.violations(row(loop_tensor="0"))[0]
    assert (
        "5.21 instructions per weight, expected at most 5.2" in sass.violations(row(instructions_per_weight="5.21"))[0]
    )
    assert "at most 6.5" in sass.violations(row(architecture="90", instructions_per_weight="6.6"))[0]
    assert sass.violations(row(uses_tensor_cores="", loop_tensor="0", instructions_per_weight="9")) == []


def test_regressions_compare_with_the_same_triton():
    baseline = [row(loop_instructions="100")]
    assert sass.regressions([row(loop_instructions="105")], baseline) == []
    assert sass.regressions([row(loop_instructions="106")], baseline) == [
        "op.kernel on sm_86: main loop of 106 instructions, was 100"
    ]
    assert sass.regressions([row(loop_instructions="200", triton="2")], baseline) == []


def test_known_rows_hold_while_their_source_does(monkeypatch):
    monkeypatch.setattr(sass, "triton_version", lambda: "1")
    jobs = [sass.Job(f"op.kernel{i}", 86, "k", "_kernel") for i in range(4)]
    known = [row(name="op.kernel0"), row(name="op.kernel1", key="old"), row(name="op.kernel2", triton="0")]
    known.append(row(name="op.kernel3"))
    kept, left = sass.split_known(jobs, known)
    assert [job.name for job in left] == ["op.kernel1", "op.kernel2", "op.kernel3"]  # the last as a sample
    assert kept == known[:1]


def test_merge_drops_what_a_complete_run_no_longer_has(monkeypatch):
    monkeypatch.setattr(sass, "triton_version", lambda: "1")
    old = [row(name="a"), row(name="b"), row(name="b", triton="0")]
    new = [row(name="a", loop_instructions="7")]
    assert sass.merge(old, new, is_complete=True) == [old[2], *new]
    assert sass.merge(old, new, is_complete=False) == [*old[1:], *new]


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "sass.csv"
    assert sass.read_rows(path) == []
    rows = [row(name="b"), row(name="a", architecture="120"), row(name="a", architecture="80")]
    sass.write_rows(path, rows)
    assert sass.read_rows(path) == [rows[2], rows[1], rows[0]]
    path.write_text("name\n")
    with pytest.raises(ValueError, match="expected the header name,architecture"):
        sass.read_rows(path)


def test_listing():
    loop = read_main_loop(LISTING)
    assert [family(text) for text in loop.instructions] == ["LDS", "HMMA", "HMMA", "LDG", "BRA"]
    assert loop.tensor_instructions == 2
    assert tensor_fma_per_warp(loop.instructions) == 16 * 8 * 16 + 16 * 8 * 8
    assert global_bytes_per_thread(loop.instructions) == 1
    assert global_bytes_per_thread(["LDG.E.128 R1", "STG.E R1", "LDGSTS.E.BYPASS.128 R1", "LDG.E.U16 R1"]) == 38
    assert count_local_accesses(LISTING) == 1
    assert [count_lookups(["LDS R1", "LDS.64 R2", "LDS.128 R4", "LDSM.16 R8"], size) for size in (4, 8)] == [1, 1]
    outside = (
        LISTING.replace("HMMA", "FFMA") + "        /*0990*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;\n"
    )
    assert len(read_main_loop(outside).instructions) == 13
    without_tensor = LISTING.replace("HMMA", "FFMA")
    assert family(read_main_loop(without_tensor).instructions[0]) == "LDG"
    without_loop = "\n".join(line for line in without_tensor.splitlines() if "BRA" not in line)
    assert len(read_main_loop(without_loop).instructions) == 9
    with pytest.raises(ValueError, match="no instructions"):
        read_main_loop("")


def test_usage():
    assert read_usage(" REG:255 STACK:80 SHARED:1024 LOCAL:8 CONSTANT[0]:432") == (255, 88)
    with pytest.raises(ValueError, match="expected resource usage"):
        read_usage("nothing")


def test_tensor_work_of_each_generation():
    assert tensor_fma_per_warp(["HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4]"]) == 16 * 128 * 16
    assert tensor_fma_per_warp(["UTCHMMA gdesc[UR6], gdesc[UR10]"]) is None
    assert tensor_fma_per_warp(["FFMA R1, R2"]) == 0
    ptx = "mov.b32 %r59, 136316048;\n@%p12 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd21, %rd22, %r59, %p11;"
    assert blackwell_tensor_fma(ptx, 4) == 128 * 128 * 64
    assert blackwell_tensor_fma("", 4) is None


def test_bank_conflicts():
    assert lookup_wavefronts(1) == 1
    assert lookup_wavefronts(16) == 1  # every entry has a bank of its own
    assert 3.0 < lookup_wavefronts(256) < lookup_wavefronts(1 << 20) < 4.0
    assert 2 * 2.5 < lookup_wavefronts(256, 8) < 2 * 3.2
    gather = "%1 = tt.gather %a[%b] {axis = 0 : i32} : (tensor<{}xf32, #x>, tensor<8xi32, #y>) -> tensor<8xf32, #y>"
    assert table_shape("") is None
    assert table_shape("\n".join(gather.replace("{}", size) for size in ("16", "256"))) == (256, 4)


def test_predicted_bound():
    card = CARDS[90]
    # A 128 x 128 x 64 tile in 8 warps, W in 5 more instructions a weight: the issue slots of a Hopper are short.
    work = Work(8, 60, 128 * 128 * 64, 2 * 128 * 64, 0, 0.0, True)
    assert cycles(work, card)["tensor pipe"] == 512
    assert predicted_bound(work, card) == "tensor pipe"
    assert predicted_bound(work._replace(instructions=300), card) == "issue slots"
    assert predicted_bound(work._replace(lookups=32, lookup_wavefronts=3.2), card) == "table banks"
    assert predicted_bound(work._replace(memory_bytes=1 << 20), card) == "bytes"


def test_clean_errors(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command_line.main(["sass"]) == command_line.EXIT_USAGE
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["sass"]) == command_line.EXIT_USAGE
    errors = capsys.readouterr().err
    assert "unset the variable" in errors or "not installed" in errors
    assert "pip install triton" in errors
