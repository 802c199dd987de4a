"""Keeping what a stage of training has come to, so that it goes on after an interruption."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def save(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write `tensors` and `notes` to `path`: all of it or nothing."""
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        contiguous = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(contiguous, partial, metadata={"notes": json.dumps(notes)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote."""
    with safe_open(path, "pt") as file:
        notes = json.loads((file.metadata() or {}).get("notes", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118


def of_module(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def into_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(_under(prefix, tensors))


def of_optimizer(prefix: str, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def into_optimizer(prefix: str, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(prefix, tensors).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {
        name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)
    }
