"""Weights that stay in the fewer bits of their file, and are widened where they are used.

What a format has rounded stays as it was rounded: widened at every use or once when it is read,
the numbers are the same bit for bit. Packed, they take a half to a sixth of the memory and of the
bus, and widening them takes the time of some passes over a layer. Knows nothing of files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from krea_local.kernels import PLAIN, Kernels, Quantized
from krea_local.kernels.fallback import AT_ONCE
from krea_local.kernels.rows import CODES, TABLE
from krea_local.layers import Linear

AT_A_NUMBER = 13  # bytes beside the result, of those that plain torch widens at a time
ROWS_TO_CHECK = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packing:
    """How the numbers of a matrix are packed, without the numbers.

    Attributes:
        kind: as `Parts` has them.
        dtypes: of each of its parts, by name.
        shapes: likewise; all but that of `table` begin with N.
        shape: [N, K], of the numbers themselves.
        table: the numbers of its `table`, if it has one.
    """

    kind: str
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    shape: tuple[int, int]
    table: tuple[float, ...] = ()

    def joins(self, other: Packing) -> bool:
        """Whether rows of the other could stand below those of this one."""
        return self.of_rows(1) == other.of_rows(1)

    def of_rows(self, rows: int) -> Packing:
        """The same for another number of rows."""
        shapes = {
            name: shape if name == TABLE else (rows, *shape[1:])
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=shapes, shape=(rows, self.shape[1]))


class PackedLinear(Linear):
    """A linear layer whose weight is packed, in all that `Linear` can do.

    Args:
        packing: of its weight.
        bias: whether it has one.
        dtype: of its weight where it is used, and of its bias.

    Attributes:
        kernels: whose `widen` to use on a GPU.
    """

    kernels: Kernels = PLAIN
    # Whoever looks at it, as transformers' T5 does, must not have all of it widened.
    weight: None = None  # type: ignore[assignment]

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

    def wide(self) -> Tensor:
        """Its numbers [N, K], widened now."""
        return self.weight_on(self._of(CODES).device)

    def weight_on(self, device: torch.device) -> Tensor:
        """As `Linear.weight_on`: what is copied is packed."""
        parts = {name: part.to(device, non_blocking=True) for name, part in self.parts.items()}
        out = torch.empty(self.packing.shape, dtype=self.dtype, device=device)
        widen = self.kernels.widen if device.type == "cuda" else PLAIN.widen
        return widen(self.packing.kind, parts, out)

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
        twin.low_rank, twin.kernels = self.low_rank, self.kernels
        return twin.eval()

    def _of(self, name: str) -> Tensor:
        part = self._parameters[name]
        assert part is not None
        return part


def with_checked_widening(
    kernels: Kernels, layers: Iterable[PackedLinear], device: torch.device
) -> tuple[Kernels, str | None]:
    """The kernels, with plain torch's `widen` if theirs is not right for these layers; and why.

    Compared on `device`, in some rows of a layer of each kind and width; this compiles it, too.
    """
    if kernels.widen is PLAIN.widen:
        return kernels, None
    different = {(one.packing.kind, one.parts[CODES].dtype, one.in_features): one for one in layers}
    try:
        for layer in different.values():
            parts = {
                name: (part if name == TABLE else part[:ROWS_TO_CHECK]).to(device)
                for name, part in layer.parts.items()
            }
            rows = min(ROWS_TO_CHECK, layer.out_features)
            out = torch.empty(rows, layer.in_features, dtype=layer.dtype, device=device)
            ours = kernels.widen(layer.packing.kind, parts, out)
            wanted = PLAIN.widen(layer.packing.kind, parts, torch.empty_like(out))
            if not torch.equal(ours, wanted):
                raise ValueError(f"other numbers of kind {layer.packing.kind}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as for the other kernels
        logger.info("weights are widened by plain torch", exc_info=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        notice = f"packed weights are widened by plain torch, slower than by Triton: {reason}"
        return replace(kernels, widen=PLAIN.widen), notice
    return kernels, None


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """Those in `model`."""
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


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
    packed = (layer for module in modules for layer in packed_layers(module))
    widest = max((math.prod(layer.packing.shape) for layer in packed), default=0)
    return widest * itemsize + AT_A_NUMBER * min(widest, AT_ONCE)
