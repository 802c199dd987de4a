"""Write a model's transformer in fewer bits: 8-bit floats, or GGUF's Q8_0.

The file is read, kept and, if it is of 8-bit floats, multiplied as it is: at "regular" these stand
for what the model itself is rounded to there. Its names are the original checkpoint's. One tensor
at a time is in memory, and the file has its name only once it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea_local import loading, weights
from krea_local._version import __version__
from krea_local.errors import InvalidRequest, OutputFailed
from krea_local.paths import expanded
from krea_local.progress import Bar

if TYPE_CHECKING:
    import torch

    from krea_local.any_format import Fused

SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}

Report = Callable[[int], None]


def convert(
    file: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    transformer: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Write a model's transformer in fewer bits, to be given to `load` as `transformer`.

    Args:
        file: to write, which is not there yet. A .safetensors has the matrices inside the blocks in
            8-bit floats (e4m3), a scale a row, as `acceleration="regular"` rounds them, and all
            else in bfloat16. A .gguf has those and the modulation in Q8_0, integers of 8 bits with
            a scale for each 32, which are nearer but are multiplied in bfloat16; it needs the
            package gguf.
        model: as for `load`; what is not here is not fetched.
        transformer: likewise.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The file.

    Raises:
        WeightsNotFound, WeightsInvalid, UnsupportedModel: as `load`.
        InvalidRequest: `file` has another suffix, or the weights are in fewer bits already.
        OutputFailed: it is there already, or cannot be written, or the disk is too small.
        KreaError: the package gguf is needed and not there.
    """
    target = expanded(file)
    write = {".safetensors": _write_safetensors, ".gguf": _write_gguf}.get(target.suffix)
    if write is None:
        raise InvalidRequest(f"file={str(file)!r}: should end in .safetensors or .gguf")
    if target.exists():
        raise OutputFailed(f"{str(file)!r} is there already: name another file")
    from krea_local import any_format, formats

    if target.suffix == ".gguf":
        formats.import_gguf(target)
    checkpoint = weights.find(model, transformer=transformer, fetch=False)
    loading.check_layout(checkpoint)
    files = loading.component_files(checkpoint, "transformer")
    with formats.opened(files) as stored:
        tensors = any_format.fused_tensors(checkpoint.folder / "transformer", files, stored)
        packed = [one.kind for one in stored.values() if one.packed or one.kind.startswith("IQ")]
        if packed:
            raise InvalidRequest(
                f"{str(files[0])!r} has its weights in {packed[0]}: rounding them once more would "
                "only lose; it is read as it is"
            )
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        bar = Bar(sum(one.nbytes for one in tensors.values()), show=progress, unit="B")
        try:
            write(partial, tensors, lambda count: bar.advance("transformer", count))
            partial.replace(target)
        except OSError as error:
            raise OutputFailed(f"cannot write {str(file)!r}: {error.strerror or error}") from error
        finally:
            bar.close()
            partial.unlink(missing_ok=True)
    return target


def _write_safetensors(file: Path, tensors: Mapping[str, Fused], report: Report) -> None:
    """8-bit floats, beside bfloat16, at multiples of their numbers' sizes."""
    import torch

    from krea_local.kernels import PLAIN
    from krea_local.kernels.rows import FLOAT8

    wanted: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, one in tensors.items():
        kind = "F8_E4M3" if one.is_large else "BF16"
        wanted[name] = kind, one.shape, one.count * SIZES[kind]
        if one.is_large:
            wanted[_scale_of(name)] = "F32", one.shape[:1], one.shape[0] * SIZES["F32"]
    offsets: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": _made_by()}}
    end = 0
    for name, (kind, shape, nbytes) in sorted(
        wanted.items(), key=lambda item: (-SIZES[item[1][0]], item[0])
    ):
        offsets[name], end = end, end + nbytes
        place = {"data_offsets": [offsets[name], end]}
        header[name] = {"dtype": kind, "shape": list(shape), **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    _check_space(file, start + end)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(start + end)

        def put(name: str, tensor: torch.Tensor) -> None:
            stream.seek(start + offsets[name])
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)

        for name, one in tensors.items():
            numbers = one.read()
            if one.is_large:
                values, scale = PLAIN.quantize(numbers, eight_bit=FLOAT8)
                put(name, values)
                put(_scale_of(name), scale.flatten())
            else:
                put(name, numbers)
            report(one.nbytes)
        stream.flush()
        os.fsync(stream.fileno())


def _write_gguf(file: Path, tensors: Mapping[str, Fused], report: Report) -> None:
    """Q8_0, beside bfloat16, and float32 for vectors, as such files have them."""
    import gguf
    import numpy as np

    kinds = {}
    for name, one in tensors.items():
        kinds[name] = gguf.GGMLQuantizationType.F32
        if len(one.shape) > 1:
            packs = (one.is_large or one.is_modulation) and one.shape[-1] % 32 == 0
            kinds[name] = gguf.GGMLQuantizationType["Q8_0" if packs else "BF16"]
    writer = gguf.GGUFWriter(None, "flux")
    writer.add_string("general.description", _made_by())
    total = 0
    for name, one in tensors.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = one.count // block * block_bytes
        total += nbytes
        if kinds[name] == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(name, one.shape, np.dtype(np.float32), nbytes)
        else:
            shape = gguf.quant_shape_to_byte_shape(one.shape, kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), nbytes, kinds[name])
    _check_space(file, total)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, one in tensors.items():
            writer.write_tensor_data(gguf.quantize(one.read().float().numpy(), kinds[name]))
            report(one.nbytes)
    finally:
        writer.close()


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}weight_scale"


def _made_by() -> str:
    return f"krea_local {__version__}"


def _check_space(file: Path, nbytes: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if nbytes > free:
        takes = f"it takes {nbytes / 1e9:.1f} GB"
        raise OSError(f"{takes}, and {free / 1e9:.1f} GB are free on its disk")
