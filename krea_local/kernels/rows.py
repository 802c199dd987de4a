"""What the fused operations take and return: rows of numbers, plain or in 8 bits.

The rows of all images of a call lie in one matrix, the text of all images first, then their image
tokens: [B · L + B · S, width]. A view of some rows is contiguous, whatever the batch, and what
works row by row (all but attention) needs to know nothing of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FLOAT8: 448.0, INT8: 127.0}  # of -128 … 127 the symmetric part
SMALLEST_SCALE = 1e-12  # of a row of zeros
EPS = 1e-6  # of every norm in FLUX.1
# CUTLASS's rowwise kernel reads the scales of whole tiles, past the last row (pytorch 133334).
SCALE_ROWS = 256


class Quantized(NamedTuple):
    """A matrix as `values * scale`.

    Attributes:
        values: float8_e4m3fn or int8 [R, K].
        scale: float32 [R, 1], one a row.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def empty(
        cls, rows: int, width: int, eight_bit: torch.dtype, device: torch.device
    ) -> Quantized:
        """Room for `rows` rows."""
        padded = -(-rows // SCALE_ROWS) * SCALE_ROWS
        return cls(
            torch.empty(rows, width, dtype=eight_bit, device=device),
            torch.empty(padded, 1, dtype=torch.float32, device=device)[:rows],
        )


Rows = Tensor | Quantized
"""A matrix [R, K], plain or quantised."""

CODES = "codes"  # the large one of a packed matrix's parts
TABLE = "table"  # the one that all rows share
Parts = Mapping[str, Tensor]
"""What a weight [N, K] is packed into: `codes` [N, …] and, by kind, what they are to be read with:

`float8`: `codes` in float8 [N, K]; `scale` float32 [N], which they are to be multiplied by.
`4bit`: `codes` uint8 [N, K / 2], of two numbers each, the first in the upper half, which are places
in `table` float32 [16]; `largest` float32 [N, K / b], of each run of b numbers.
A name of `ggml.KINDS`: `codes` uint8 [N, bytes], rows of its blocks.
"""


@dataclass(frozen=True)
class Layout:
    """Which rows are whose: `batch` times `text` rows, then `batch` times `image` rows."""

    batch: int
    text: int
    image: int

    @property
    def text_rows(self) -> int:
        """Rows of text, which come first."""
        return self.batch * self.text

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.batch * (self.text + self.image)


def part(rows: Rows, where: slice) -> Rows:
    """Some of the rows; no copy."""
    if isinstance(rows, Quantized):
        return Quantized(rows.values[where], rows.scale[where])
    return rows[where]
