"""Verify a model's files without a network: each file, each tensor, each number.

At most one tensor is in memory at a time. Knows nothing of the hub but the checksums that its
client leaves beside the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from krea_local import components, loading, weights
from krea_local.checksums import compute_checksum, noted_checksum
from krea_local.errors import KreaError, WeightsInvalid, WeightsNotFound
from krea_local.files import check_safetensors, read_json
from krea_local.progress import Bar
from krea_local.weights import (
    COMPONENTS,
    FOLDERS,
    IGNORED,
    SAFETY_CHECKER_FILES,
    SAFETY_CHECKER_REPO,
    Checkpoint,
)

AT_ONCE = 2**24  # numbers of a tensor that are looked at together


@dataclass(frozen=True)
class FileCheck:
    """What `verify` found out about one file, or about a folder as a whole.

    Attributes:
        name: in the layout of weights.md, such as "vae/config.json", wherever it lies.
        path: of the file, or the folder if the fault is that of none of its files.
        size: bytes; 0 for a folder.
        checksum: "sha256" or "git sha1" if it was compared with the one that the hub's client left
            beside the file; None if none is known.
        tensors: how many there are, all of finite numbers; 0 for other files.
        fault: what is wrong, or None.
    """

    name: str
    path: Path
    size: int
    checksum: str | None = None
    tensors: int = 0
    fault: str | None = None


def verify(
    model: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> list[FileCheck]:
    """Read all of a model's files, and its safety checker's, and see whether they are right.

    Each file is compared with the hub's checksum where that is known, each safetensors file with
    its header, each tensor in name and shape with the model, each weight with NaN and infinity;
    tokenizers and configurations are read. Nothing is fetched.

    Args:
        model: as for `load`; a hub id or alias is looked for in the hub's cache only.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        One a file, in the order of the folders. All is well if none has a `fault`.

    Raises:
        WeightsNotFound: there is no such model here.
        UnsupportedModel: another architecture, by its name.
    """
    checkpoint = replace(weights.find(model, fetch=False), offline=True)
    checker = _safety_checker(checkpoint)
    files = list(_files(checkpoint, checker))
    bar = Bar(sum(map(_work, files)), show=progress, unit="B")
    try:
        found = [_check_file(file, lambda count: bar.advance("verify", count)) for file in files]
    finally:
        bar.close()
    for name, folder, fault in _faults_of_parts(checkpoint, checker):
        if not any(_tells_of(fault, one, checkpoint.folder) for one in found):
            found.append(FileCheck(name, folder, 0, fault=fault))
    return found


def _tells_of(fault: str, check: FileCheck, folder: Path) -> bool:
    """Whether the fault of a part is that of a damaged file, which is named already."""
    if not check.fault:
        return False
    part = check.path.parent
    return str(check.path) in fault or (
        part != folder and any(f"{part}{end}" in fault for end in ("'", os.sep))
    )


def _safety_checker(checkpoint: Checkpoint) -> Path | None:
    try:
        return weights.find_safety_checker(checkpoint, SAFETY_CHECKER_REPO)
    except WeightsNotFound:
        return None


@dataclass(frozen=True)
class _File:
    """A file to look at: its name in the layout, its path, and the checksum it should have."""

    name: str
    path: Path
    checksum: str | None


def _files(checkpoint: Checkpoint, checker: Path | None) -> Iterator[_File]:
    """What `load` may read, and what of it is gone: a link of the cache that leads nowhere."""
    folder = checkpoint.folder
    index = folder / "model_index.json"
    paths = [index] if index.exists() or index.is_symlink() else []
    for name in FOLDERS:
        paths += sorted(
            path
            for path in (folder / name).rglob("*")
            if not path.is_dir() and not any(path.match(pattern) for pattern in IGNORED)
        )
    for path in paths:
        name = path.relative_to(folder).as_posix()
        yield _File(name, path, noted_checksum(folder, name))
    own = checkpoint.transformer_file
    if own:
        yield _File(f"transformer/{own.name}", own, noted_checksum(own.parent, own.name))
    for name in SAFETY_CHECKER_FILES if checker else ():
        assert checker is not None
        yield _File(f"safety_checker/{name}", checker / name, noted_checksum(checker, name))


def _work(file: _File) -> int:
    """The bytes that `_check_file` will read."""
    if not file.path.exists():
        return 0
    times = (file.checksum is not None) + (file.path.suffix == ".safetensors")
    return file.path.stat().st_size * times


def _check_file(file: _File, on_bytes: Callable[[int], None]) -> FileCheck:
    """Look at one file by itself."""
    path, expected = file.path, file.checksum
    size = path.stat().st_size if path.exists() else 0
    kind = None
    tensors = 0
    try:
        if not path.exists():
            raise WeightsNotFound(f"{str(path)!r} is missing")
        if expected:
            found = compute_checksum(path, expected, on_bytes)
            if found != expected:
                raise WeightsInvalid(
                    f"its checksum is {found[:12]}…, but the hub's is {expected[:12]}…"
                )
            kind = "sha256" if len(expected) == 64 else "git sha1"
        if path.suffix == ".safetensors":
            check_safetensors(path)
            tensors = sum(1 for _ in _finite_tensors(path, on_bytes))
        elif path.suffix == ".json":
            read_json(path)
    except (KreaError, OSError) as error:
        return FileCheck(file.name, path, size, fault=str(error))
    return FileCheck(file.name, path, size, kind, tensors)


def _finite_tensors(file: Path, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """The names of a file's tensors, one after the other.

    Raises:
        WeightsInvalid: one holds NaN or infinity.
    """
    import torch

    for name, tensor in components.tensors_of(file):
        if tensor.is_floating_point():
            for part in tensor.flatten().split(AT_ONCE):
                if not torch.isfinite(part.float()).all():  # 8-bit formats know no isfinite
                    raise WeightsInvalid(f"tensor {name} holds NaN or infinity")
        on_bytes(tensor.nbytes)
        yield name


def _faults_of_parts(
    checkpoint: Checkpoint, checker: Path | None
) -> Iterator[tuple[str, Path, str]]:
    """What is wrong with the files together, as (name, folder, fault)."""
    import torch
    from transformers import ViTForImageClassification

    meta = torch.device("meta")  # names and shapes only
    parts: list[tuple[str, Path, Callable[[], object]]] = [
        (name, checkpoint.folder, partial(check, checkpoint))
        for name, check in (
            ("model", loading.check_layout),
            ("scheduler", loading.read_shift),
            ("tokenizers", loading.load_tokenizers),
        )
    ]
    for name in COMPONENTS:
        check_component = partial(loading.check_component, checkpoint, name)
        parts.append((name, checkpoint.folder / name, check_component))
    if checker:
        kind = ViTForImageClassification
        load = partial(components.load_pretrained, kind, checker, dtype=torch.float32, device=meta)
        parts.append(("safety_checker", checker, load))
    seen = set()
    for name, place, check in parts:
        try:
            check()
        except KreaError as error:
            if str(error) not in seen:  # a missing file shows in several places
                seen.add(str(error))
                yield name, place, str(error)
