"""Write a transformer's large weights in 8-bit floats, as `acceleration="regular"` rounds them.

The file is a third smaller than the model's own, and is read, kept and multiplied as it is: at
"regular" it stands for what the model itself is rounded to there. One tensor at a time is in
memory, and the file has its name only once it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from krea_local import loading, weights
from krea_local._version import __version__
from krea_local.errors import InvalidRequest, OutputFailed
from krea_local.paths import expanded
from krea_local.progress import Bar

if TYPE_CHECKING:
    import torch

    from krea_local.formats import Stored

SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True)
class _Written:
    """A tensor of the new file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = SIZES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def convert(
    file: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    transformer: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Write a model's transformer with its blocks' matrices in 8-bit floats, a scale a row.

    All else stays in bfloat16. `load(transformer=file)` takes it, and needs neither the wide
    weights nor their memory then.

    Args:
        file: to write, a .safetensors that is not there yet.
        model: as for `load`; what is not here is not fetched.
        transformer: likewise.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The file.

    Raises:
        WeightsNotFound, WeightsInvalid, UnsupportedModel: as `load`.
        InvalidRequest: `file` has another suffix, or the weights are in fewer bits already.
        OutputFailed: it is there already, or cannot be written, or the disk is too small.
    """
    target = expanded(file)
    if target.suffix != ".safetensors":
        raise InvalidRequest(f"file={str(file)!r}: should end in .safetensors")
    if target.exists():
        raise OutputFailed(f"{str(file)!r} is there already: name another file")
    from krea_local import any_format, formats

    checkpoint = weights.find(model, transformer=transformer, fetch=False)
    loading.check_layout(checkpoint)
    files = loading.component_files(checkpoint, "transformer")
    folder = checkpoint.folder / "transformer"
    with formats.opened(files) as stored:
        large = any_format.large_weights(folder, files, stored)
        packed = [one.kind for one in stored.values() if one.packed or one.kind.startswith("IQ")]
        if packed:
            raise InvalidRequest(
                f"{str(files[0])!r} has its weights in {packed[0]}: rounding them once more would "
                "only lose; it is read as it is"
            )
        wanted = dict(_contents(stored, large))
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        bar = Bar(sum(one.nbytes for one in stored.values()), show=progress, unit="B")
        try:
            _write(partial, wanted, stored, bar)
            partial.replace(target)
        except OSError as error:
            raise OutputFailed(f"cannot write {str(file)!r}: {error.strerror or error}") from error
        finally:
            bar.close()
            partial.unlink(missing_ok=True)
    return target


def _contents(stored: Mapping[str, Stored], large: set[str]) -> Iterator[tuple[str, _Written]]:
    for name, one in stored.items():
        if name in large:
            yield name, _Written("F8_E4M3", one.shape)
            yield _scale_of(name), _Written("F32", one.shape[:1])
        else:
            yield name, _Written("BF16", one.shape)


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}weight_scale"


def _write(
    file: Path, wanted: Mapping[str, _Written], stored: Mapping[str, Stored], bar: Bar
) -> None:
    """Write a file of these tensors, at multiples of their numbers' sizes."""
    import torch

    from krea_local.kernels import PLAIN
    from krea_local.kernels.rows import FLOAT8

    offsets: dict[str, int] = {}
    made = {"format": "pt", "made_by": f"krea_local {__version__}"}
    header: dict[str, object] = {"__metadata__": made}
    end = 0
    for name, new in sorted(wanted.items(), key=lambda item: (-SIZES[item[1].dtype], item[0])):
        offsets[name], end = end, end + new.nbytes
        place = {"data_offsets": [offsets[name], end]}
        header[name] = {"dtype": new.dtype, "shape": list(new.shape), **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    free = shutil.disk_usage(file.parent).free
    if start + end > free:
        needed = f"{(start + end) / 1e9:.1f} GB"
        raise OSError(f"it takes {needed}, and {free / 1e9:.1f} GB are free on its disk")
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(start + end)

        def put(name: str, tensor: torch.Tensor) -> None:
            stream.seek(start + offsets[name])
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)

        for name, one in stored.items():
            numbers = one.read().bfloat16()
            if wanted[name].dtype == "BF16":
                put(name, numbers)
            else:
                values, scale = PLAIN.quantize(numbers, eight_bit=FLOAT8)
                put(name, values)
                put(_scale_of(name), scale.flatten())
            bar.advance("transformer", one.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
