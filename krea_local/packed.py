"""Weights that stay in the fewer bits of their file, and are widened where they are used.

What a format has rounded stays as it was rounded: widened at every use or once when it is read,
the numbers are the same bit for bit. Packed, they take a half to a sixth of the memory and of the
bus, and widening them takes the time of some passes over a layer. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from krea_local import ggml
from krea_local.kernels import Quantized
from krea_local.layers import Linear

CODES = "codes"  # the large one of a matrix's parts
TABLE = "table"  # the one that all rows share
AT_ONCE = 2**23  # numbers that are widened at a time
AT_A_NUMBER = 14  # bytes that this takes, beside the result: three in float32, two of their codes

Parts = Mapping[str, Tensor]
"""What a matrix [N, K] is packed into: `codes` [N, …] and, by kind, what they are to be read with:

`float8`: `codes` in float8 [N, K]; `scale` float32 [N], which they are to be multiplied by.
`4bit`: `codes` uint8 [N, K / 2], of two numbers each, the first in the upper half, which are places
in `table` float32 [16]; `largest` float32 [N, K / b], of each run of b numbers.
A name of ggml's: `codes` uint8 [N, bytes], rows of its blocks.
"""


def widen(kind: str, parts: Parts) -> Tensor:
    """All numbers of some rows: float32 [N, K]."""
    codes = parts[CODES]
    if kind == "float8":
        numbers: Tensor = codes.float().mul_(parts["scale"][:, None])
        return numbers
    if kind == "4bit":
        places = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)
        largest = parts["largest"]
        runs = parts[TABLE][places.int()].unflatten(1, (largest.shape[1], -1))
        wide: Tensor = runs.mul_(largest[:, :, None]).flatten(1)
        return wide
    return ggml.widen(kind, codes)


@dataclass(frozen=True)
class Packing:
    """How the numbers of a matrix are packed, without the numbers.

    Attributes:
        kind: as `Parts` has them.
        dtypes: of each of its parts, by name.
        shapes: likewise; all but that of `table` begin with N.
        shape: [N, K], of the numbers themselves.
    """

    kind: str
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    shape: tuple[int, int]

    @classmethod
    def of(cls, kind: str, parts: Parts, shape: tuple[int, int]) -> Packing:
        """That of `parts`, which may be on the device "meta"."""
        return cls(
            kind,
            {name: part.dtype for name, part in parts.items()},
            {name: tuple(part.shape) for name, part in parts.items()},
            shape,
        )

    def joins(self, other: Packing) -> bool:
        """Whether rows of the other could stand below those of this one."""
        return (self.kind, self.dtypes, self.shape[1]) == (
            other.kind,
            other.dtypes,
            other.shape[1],
        ) and all(
            shape[1:] == other.shapes[name][1:] and (name != TABLE or shape == other.shapes[name])
            for name, shape in self.shapes.items()
        )

    def of_rows(self, rows: int) -> Packing:
        """The same for another number of rows."""
        shapes = {
            name: shape if name == TABLE else (rows, *shape[1:])
            for name, shape in self.shapes.items()
        }
        return Packing(self.kind, self.dtypes, shapes, (rows, self.shape[1]))


class PackedLinear(Linear):
    """A linear layer whose weight is packed, in all that `Linear` can do.

    Args:
        packing: of its weight.
        bias: whether it has one.
        dtype: of its weight where it is used, and of its bias.
    """

    def __init__(self, packing: Packing, *, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packing.shape
        self.packing = packing
        self.dtype = dtype
        for name, shape in packing.shapes.items():
            part = torch.empty(shape, dtype=packing.dtypes[name])
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        empty = torch.empty(packing.shape[0], dtype=dtype) if bias else None
        self.bias: Any = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        """As `Parts` says."""
        return {name: self._of(name) for name in self.packing.shapes}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its numbers [N, K], widened now."""
        return self.weight_on(self._of(CODES).device)

    def weight_on(self, device: torch.device) -> Tensor:
        """As `Linear.weight_on`: what is copied is packed."""
        parts = {name: part.to(device, non_blocking=True) for name, part in self.parts.items()}
        rows, columns = self.packing.shape
        out = torch.empty(rows, columns, dtype=self.dtype, device=device)
        step = max(1, AT_ONCE // columns)
        for start in range(0, rows, step):
            some = {
                name: part if name == TABLE else part[start : start + step]
                for name, part in parts.items()
            }
            out[start : start + step] = widen(self.packing.kind, some)
        return out

    @property
    def is_float8(self) -> bool:
        """Whether its codes are what products in 8-bit floats take."""
        return self.packing.dtypes[CODES] == torch.float8_e4m3fn

    def kept_float8(self, device: torch.device) -> Quantized | None:
        """As `Linear.kept_float8`, in the same memory."""
        if not self.is_float8:
            return None
        return Quantized(self._of(CODES), self._of("scale")[:, None])

    def twin(self) -> PackedLinear:
        """Another layer with the same weights, in the same memory."""
        with torch.device("meta"):
            twin = PackedLinear(self.packing, bias=self.bias is not None, dtype=self.dtype)
        twin._parameters = dict(self._parameters)
        twin.low_rank = self.low_rank
        return twin.eval()

    def _of(self, name: str) -> Tensor:
        part = self._parameters[name]
        assert part is not None
        return part


def weight_bytes(modules: Iterable[nn.Module], itemsize: int) -> int:
    """What the weights in modules take, where all that is not packed takes `itemsize` a number."""
    found = {}  # by id: tied weights are one
    for module in (inner for outer in modules for inner in outer.modules()):
        packed = module.packing.shapes if isinstance(module, PackedLinear) else ()
        for name, one in module._parameters.items():
            if one is not None:
                found[id(one)] = one.nbytes if name in packed else one.numel() * itemsize
    return sum(found.values())


def scratch_bytes(modules: Iterable[nn.Module], itemsize: int) -> int:
    """What widening takes at most, beside the weights: one layer, and what is at it at a time."""
    packed = (
        inner for outer in modules for inner in outer.modules() if isinstance(inner, PackedLinear)
    )
    widest = max((math.prod(layer.packing.shape) for layer in packed), default=0)
    return widest * itemsize + AT_A_NUMBER * min(widest, AT_ONCE)
