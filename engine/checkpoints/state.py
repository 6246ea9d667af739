"""State of optimizer, schedule, loss scale and random numbers as JSON and safetensors: nothing that runs code.

A state is nested dictionaries, lists and tuples of numbers, text, None and tensors. `<name>.json` holds its structure,
in which {"tensor": k} stands for the tensor of that name in `<name>.safetensors`; dictionaries are lists of pairs,
since JSON would make text of the optimizer's whole-number keys. Floats are written so that they read back to the bit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.store import CheckpointError

_MAX_JSON_BYTES = 1 << 26
_PLAIN = (bool, int, float, str, type(None))
_MOMENT_DTYPES = ("float32", "bfloat16", "float16")
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_PACKED_MOMENT = "OptimState8bit"  # torchao's, the one tensor subclass an optimizer here keeps


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write `<name>.json`, and `<name>.safetensors` if there are tensors in the state.

    Raises:
        TypeError: something in it is none of the above; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    structure = _taken_apart(state, name, tensors)
    (folder / f"{name}.json").write_text(json.dumps(structure) + "\n", encoding="utf-8")
    if tensors:
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        path.chmod((folder / f"{name}.json").stat().st_mode & 0o777)  # the umask's, which safetensors does not heed


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote, with tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or not one of its making.
    """
    path = folder / f"{name}.json"
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES:,} bytes")
        structure = json.loads(path.read_bytes())
        weights = folder / f"{name}.safetensors"
        tensors = load_file(weights) if weights.is_file() else {}
        return _put_together(structure, tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing, and training would silently go on without it") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not the state that was saved ({type(error).__name__}: {error})") from error


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, torch, and every GPU of this process."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Random numbers go on as they would have at `random_state`.

    Raises:
        CheckpointError: it is of another kind of machine, one with more or fewer GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved = len(state.get("cuda", ()))
    if saved != gpus:
        raise CheckpointError(
            f"the checkpoint has random states of {saved} GPUs, this process sees {gpus}: resume where there are as "
            "many"
        )
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if gpus:
        torch.cuda.set_rng_state_all(state["cuda"])


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """`optimizer.load_state_dict`, after groups and shapes were compared.

    Raises:
        CheckpointError: it is the state of an optimizer of other parameters.
    """
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    for group, saved_group in zip(groups, saved_groups, strict=False):
        if different := group.keys() ^ saved_group.keys():
            raise CheckpointError(
                f"{path}: is the state of another kind of optimizer (they differ in {', '.join(sorted(different))}): "
                "resume with the one it was saved with"
            )
    counts, saved = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    if counts != saved:
        raise CheckpointError(
            f"{path}: has the state of {sum(saved)} trained tensors in {len(saved)} groups, here are {sum(counts)} in "
            f"{len(counts)}: resume with the taps policy (taps='none' trains fewer) and the optimizer it was saved with"
        )
    parameters = [parameter for group in groups for parameter in group["params"]]
    order = [index for group in saved_groups for index in group["params"]]
    for parameter, index in zip(parameters, order, strict=True):
        for name, value in state["state"].get(index, {}).items():
            if name in _LIKE_PARAMETER and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} of tensor {index} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(parameter.shape)}"
                )
    optimizer.load_state_dict(state)


def _taken_apart(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if type(value).__name__ == _PACKED_MOMENT:
            names, (signed, dtype) = value.__tensor_flatten__()
            parts = {name: _taken_apart(getattr(value, name), f"{place}.{name}", tensors) for name in names}
            return {"moment": parts, "signed": signed, "dtype": str(dtype).removeprefix("torch.")}
        tensors[str(len(tensors))] = value.detach().cpu().clone().contiguous()
        return {"tensor": str(len(tensors) - 1)}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        pairs = [(_key(key, place), _taken_apart(item, f"{place}[{key!r}]", tensors)) for key, item in value.items()]
        return {"pairs": pairs}
    if isinstance(value, list | tuple):
        items = [_taken_apart(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved without pickle")


def _key(key: Any, place: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{place}: a key of type {type(key).__name__} cannot be saved")
    return key


def _put_together(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if type(structure) in _PLAIN:
        return structure
    if isinstance(structure, list):
        return [_put_together(item, tensors) for item in structure]
    if structure.keys() == {"tensor"}:
        return tensors[structure["tensor"]]
    if structure.keys() == {"tuple"}:
        return tuple(_put_together(item, tensors) for item in structure["tuple"])
    if structure.keys() == {"pairs"}:
        return {key: _put_together(item, tensors) for key, item in structure["pairs"]}
    if structure.keys() == {"moment", "signed", "dtype"} and structure["dtype"] in _MOMENT_DTYPES:
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = {name: _put_together(item, tensors) for name, item in structure["moment"].items()}
        dtype = getattr(torch, structure["dtype"])
        return OptimState8bit.__tensor_unflatten__(parts, (bool(structure["signed"]), dtype))
    raise ValueError(f"unknown entry {sorted(map(str, structure))[:5]}")
