"""Compiles GPU kernels for cards that are not here, and measures what comes out.

Needs Triton, and none of its interpreter: the variable TRITON_INTERPRET must not be set in the process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ladder_kernels.gpu
from benchmarks.sass_listing import (
    Loop,
    count_local_accesses,
    count_lookups,
    global_bytes_per_thread,
    read_main_loop,
    read_usage,
    tensor_fma_per_warp,
)
from benchmarks.sass_model import (
    CARDS,
    WARP,
    Work,
    blackwell_tensor_fma,
    lookup_wavefronts,
    predicted_bound,
    table_shape,
)
from ladder_kernels.gpu.spec import KernelSpec

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # carried by Triton's wheel
_SHOWN_FAMILIES = 8


@triton.jit
def _dense_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    rows,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = x @ weight^T on whole tiles, the weight as first operand: what a kernel that decodes would cost without."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in tl.range(0, cols, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptr + row[:, None] * cols + (begin + col)[None, :])
        x = tl.load(x_ptr + token[:, None] * cols + (begin + col)[None, :])
        total = tl.dot(weight, x.T, total)
    tl.store(out_ptr + token[None, :] * rows + row[:, None], total.to(out_ptr.dtype.element_ty))


@functools.cache
def all_specs() -> dict[str, KernelSpec]:
    """Specs of all modules of ladder_kernels.gpu by name.

    Raises:
        ValueError: two have the same name.
    """
    specs: dict[str, KernelSpec] = {}
    for module in _modules():
        for spec in module.specs():
            if spec.name in specs:
                raise ValueError(f"{module.__name__}: expected unique names of specs, got {spec.name!r} twice")
            specs[spec.name] = spec
    return specs


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(ladder_kernels.gpu.__path__, f"{ladder_kernels.gpu.__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, "specs"):
            yield module


def source_key(spec: KernelSpec) -> str:
    """Hash of all that decides what is compiled, but for the architecture and Triton."""
    text = "\n".join(_sources(spec.kernel, set()))
    settings = [sorted((key, str(value)) for key, value in part.items()) for part in (spec.types, spec.constants)]
    options = (spec.divisible, spec.num_warps, spec.num_stages, spec.weights_per_iteration, spec.enable_fp_fusion)
    return hashlib.sha256(f"{text}{settings}{options}".encode()).hexdigest()[:16]


def _sources(kernel: Any, seen: set[str]) -> Iterator[str]:
    """Source of a device function, the constants it names, and the same of the functions it calls."""
    if kernel.__name__ in seen:
        return
    seen.add(kernel.__name__)
    yield kernel.src
    names = sorted(kernel.fn.__code__.co_names)
    scopes = [kernel.fn.__globals__]
    scopes += [vars(scopes[0][name]) for name in names if isinstance(scopes[0].get(name), ModuleType)]
    for name in names:
        for value in (scope[name] for scope in scopes if name in scope):
            if isinstance(value, tl.constexpr):
                yield f"{name} = {value.value}"
            elif isinstance(value, triton.JITFunction) and value.__module__.startswith("ladder_kernels"):
                yield from _sources(value, seen)


def measure(spec: KernelSpec, architecture: int) -> dict[str, str]:
    """Compile one spec for an architecture: a row of the table, without what identifies it."""
    asm, shared, usage, listing = _compile(spec, architecture)
    loop = read_main_loop(listing)
    threads = WARP * spec.num_warps
    table = table_shape(asm["ttgir"])
    wavefronts = lookup_wavefronts(*table) if table else 0.0
    tensor = loop.tensor_instructions
    if (fma := tensor_fma_per_warp(loop.instructions)) is not None:
        fma *= spec.num_warps
    else:
        fma = blackwell_tensor_fma(asm["ptx"], tensor)
    work = Work(
        warps=spec.num_warps,
        instructions=len(loop.instructions),
        tensor_fma=fma,
        memory_bytes=global_bytes_per_thread(loop.instructions) * threads,
        lookups=count_lookups(loop.instructions, table[1]) if table else 0,
        lookup_wavefronts=wavefronts,
        is_shared_by_blocks=tensor > 0,
    )
    per_weight = _instructions_per_weight(spec, architecture, loop)
    return {
        "registers": str(usage.registers),
        "spill_bytes": str(usage.stack_bytes),
        "local_accesses": str(count_local_accesses(listing)),
        "shared_bytes": str(shared),
        "threads": str(threads),
        "loop_instructions": str(work.instructions),
        "loop_tensor": str(tensor),
        "loop_mix": " ".join(f"{name}={count}" for name, count in _sorted_mix(loop)[:_SHOWN_FAMILIES]),
        "instructions_per_weight": "" if per_weight is None else f"{per_weight:.2f}",
        "lookup_wavefronts": f"{wavefronts:.2f}" if table and spec.weights_per_iteration else "",
        "bound": "unknown" if tensor and not fma else predicted_bound(work, CARDS[architecture]),
    }


def _sorted_mix(loop: Loop) -> list[tuple[str, int]]:
    return sorted(loop.families.items(), key=lambda item: (-item[1], item[0]))


def _instructions_per_weight(spec: KernelSpec, architecture: int, loop: Loop) -> float | None:
    """Of a thread, per NF4 weight that it decodes; with tensor cores what is left without those of a dense product."""
    if not spec.weights_per_iteration:
        return None
    instructions = len(loop.instructions)
    if spec.uses_tensor_cores:
        instructions -= _dense_loop_instructions(
            architecture,
            spec.types["x_ptr"],
            spec.constants["BLOCK_M"],
            spec.weights_per_iteration // spec.constants["BLOCK_K"],
            spec.constants["BLOCK_K"],
            spec.num_warps,
            spec.num_stages,
        )
    return instructions * WARP * spec.num_warps / spec.weights_per_iteration


@functools.cache
def _dense_loop_instructions(
    architecture: int, x_type: str, block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int
) -> int:
    spec = KernelSpec(
        "dense",
        _dense_linear_kernel,
        dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), x_type) | dict.fromkeys(("tokens", "rows", "cols"), "i32"),
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": num_stages},
        divisible=("tokens", "rows", "cols"),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return len(read_main_loop(_compile(spec, architecture)[3]).instructions)


def _compile(spec: KernelSpec, architecture: int) -> tuple[Mapping[str, Any], int, Any, str]:
    """Intermediate texts, bytes of shared memory, resource usage and disassembly."""
    names = spec.kernel.arg_names
    missing = set(names) ^ (set(spec.types) | set(spec.constants))
    if missing:
        raise ValueError(f"{spec.name}: expected a type or a constant for each argument, check {sorted(missing)}")
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if name in spec.divisible or spec.types.get(name, "").startswith("*")
    ]
    source = ASTSource(
        spec.kernel,
        signature={name: spec.types.get(name, "constexpr") for name in names},
        constexprs=dict(spec.constants),
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, WARP),
        options={
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "enable_fp_fusion": spec.enable_fp_fusion,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = read_usage(_run("cuobjdump", "--dump-resource-usage", file.name))
        listing = _run("nvdisasm", "-c", file.name)
    return compiled.asm, compiled.metadata.shared, usage, listing


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
