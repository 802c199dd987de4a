"""The files of a checkpoint's component: which they are, and that they are whole.

Only safetensors, never pickles. A file is judged by its header, before any of its tensors is read.
Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krea_local.errors import WeightsError, WeightsInvalid, WeightsNotFound
from krea_local.weights import PICKLES

AGAIN = "fetch it again (`krea-local download`)"
FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def weight_files(folder: Path, *, floats_only: bool = True) -> list[Path]:
    """The safetensors files of a component: one, or the shards that its index names.

    Args:
        folder: of the component.
        floats_only: refuse tensors of anything else, which may stand for other numbers.

    Raises:
        WeightsNotFound: none, or a shard is missing.
        WeightsInvalid: there are only pickles, or a file is truncated.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        where = read_json(indices[0]).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(one, str) for one in where.values()):
            raise WeightsInvalid(f"{str(indices[0])!r} should hold a weight_map of file names")
        files = [folder / shard for shard in sorted(set(where.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
        usual = [file for file in files if file.name in USUAL_NAMES]
        if len(files) > 1 and not usual:
            raise WeightsInvalid(
                f"{str(folder)!r} holds {len(files)} .safetensors and no index: which one is meant?"
            )
        files = usual or files
    if not files:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise WeightsInvalid(
                f"{str(folder / pickles[0])!r} is a pickle, which can run any code: only "
                ".safetensors are read; get that file, or convert it where you trust it"
            )
        raise WeightsNotFound(f"no .safetensors in {str(folder)!r}: weights.md lists the files")
    for file in files:
        header = check_safetensors(file)
        if floats_only:
            _refuse_others(file, header)
    return files


def check_safetensors(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read a safetensors header and compare it with the file's length.

    Returns:
        Tensor name → {"dtype", "shape", "data_offsets"}.

    Raises:
        WeightsNotFound: no such file.
        WeightsInvalid: truncated, a Git LFS pointer, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version "):
                raise WeightsInvalid(f"{str(file)!r} is a Git LFS pointer: run `git lfs pull`")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, 100_000_000):
                raise WeightsInvalid(
                    f"{str(file)!r} is truncated or not safetensors: its header should take "
                    f"{length:,} bytes, the file has {size:,}; {AGAIN}"
                )
            content = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise WeightsNotFound(f"no file {str(file)!r}: {AGAIN}") from error
    except OSError as error:
        raise WeightsNotFound(f"cannot read {str(file)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsInvalid(f"{str(file)!r} is not safetensors: {AGAIN}") from error
    try:
        header: dict[str, dict[str, Any]] = dict(content)
        header.pop("__metadata__", None)
        shapes = [tuple(map(int, tensor["shape"])) for tensor in header.values()]
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        assert len(shapes) == len(header)
        if not all(isinstance(tensor["dtype"], str) for tensor in header.values()):
            raise TypeError("dtype")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise WeightsInvalid(f"{str(file)!r} is not safetensors: {AGAIN}") from error
    if 8 + length + end != size:
        raise WeightsInvalid(
            f"{str(file)!r} is truncated: {size:,} of {8 + length + end:,} bytes; {AGAIN}"
        )
    return header


def _refuse_others(file: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    for name, tensor in header.items():
        # The published CLIP file has one tensor of integers, its positions.
        if tensor["dtype"] not in (*FLOATS, *FLOAT8) and not name.endswith("position_ids"):
            raise WeightsInvalid(
                f"{str(file)!r}: tensor {name} is {tensor['dtype']}: such weights are not read"
            )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `WeightsInvalid` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsInvalid(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsInvalid(f"{str(file)!r} should hold a JSON object")
    return content
