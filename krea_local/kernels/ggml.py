"""ggml's blocks of packed numbers, the contents of GGUF files, widened by torch on any device.

A row of a matrix is a row of blocks, each of 32 or 256 numbers with scales of their own. Arithmetic
is in float32, operation by operation as in the package `gguf`, whose numbers these are bit for bit;
that one works on the CPU alone, and others' torch code makes a GPU wait for shifts from the host.

Source: ggml, `ggml-common.h` and `ggml-quants.c`; oracle: `gguf.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _fields(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Blocks [n, bytes] cut into fields of so many bytes."""
    assert sum(sizes) == blocks.shape[1]
    fields: tuple[Tensor, ...] = blocks.split(sizes, dim=1)
    return fields


def _half(field: Tensor) -> Tensor:
    """Two bytes a block → float32 [n, 1]."""
    return field.contiguous().view(torch.float16).float()


def _nibbles(field: Tensor, run: int) -> Tensor:
    """Bytes → numbers of 4 bits: of each `run` bytes the lower halves, then the upper ones."""
    pieces = field.unflatten(1, (-1, run))
    return torch.stack([pieces & 15, pieces >> 4], dim=2).flatten(1)


def _bits(field: Tensor, run: int, width: int) -> Tensor:
    """Bytes → numbers of `width` bits: of each `run` bytes the lowest bits, then the next ones."""
    pieces, mask = field.unflatten(1, (-1, run)), (1 << width) - 1
    planes = [(pieces >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(planes, dim=2).flatten(1)


def _spread_bits(field: Tensor) -> Tensor:
    """Bytes → their bits, each byte's lowest first."""
    return torch.stack([(field >> shift) & 1 for shift in range(8)], dim=2).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    d, qs = _fields(blocks, 2, 16)
    return _half(d) * (_nibbles(qs, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = _fields(blocks, 2, 2, 16)
    return _half(d) * _nibbles(qs, 16).float() + _half(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, qh, qs = _fields(blocks, 2, 4, 16)
    return _half(d) * ((_nibbles(qs, 16) | (_spread_bits(qh) << 4)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, qh, qs = _fields(blocks, 2, 2, 4, 16)
    return _half(d) * (_nibbles(qs, 16) | (_spread_bits(qh) << 4)).float() + _half(m)


def _q8_0(blocks: Tensor) -> Tensor:
    d, qs = _fields(blocks, 2, 32)
    return _half(d) * qs.contiguous().view(torch.int8).float()


def _scaled(scale: Tensor, numbers: Tensor, less: Tensor | None = None) -> Tensor:
    """Numbers [n, 256] times scale [n, g] of each run of 256 / g, less another such number."""
    runs = scale[:, :, None] * numbers.float().unflatten(1, (scale.shape[1], -1))
    all_runs: Tensor = runs if less is None else runs - less[:, :, None]
    return all_runs.flatten(1)


def _k_scales(field: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes → 8 scales and 8 minima, of 6 bits each."""
    low, middle, high = _fields(field, 4, 4, 4)
    scale = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    least = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1)
    return scale.float(), least.float()


def _q2_k(blocks: Tensor) -> Tensor:
    scales, qs, d, least = _fields(blocks, 16, 64, 2, 2)
    return _scaled(
        _half(d) * (scales & 15).float(), _bits(qs, 32, 2), _half(least) * (scales >> 4).float()
    )


def _q3_k(blocks: Tensor) -> Tensor:
    high, qs, scales, d = _fields(blocks, 32, 64, 12, 2)
    low, upper = _fields(scales, 8, 4)
    scale = (_nibbles(low, 8) | (_bits(upper, 4, 2) << 4)).float() - 32
    numbers = _bits(qs, 32, 2).float() - (4 - 4 * _bits(high, 32, 1).float())
    return _scaled(_half(d) * scale, numbers)


def _q4_k(blocks: Tensor) -> Tensor:
    d, least, scales, qs = _fields(blocks, 2, 2, 12, 128)
    scale, offset = _k_scales(scales)
    return _scaled(_half(d) * scale, _nibbles(qs, 32), _half(least) * offset)


def _q5_k(blocks: Tensor) -> Tensor:
    d, least, scales, qh, qs = _fields(blocks, 2, 2, 12, 32, 128)
    scale, offset = _k_scales(scales)
    numbers = _nibbles(qs, 32) | (_bits(qh, 32, 1) << 4)
    return _scaled(_half(d) * scale, numbers, _half(least) * offset)


def _q6_k(blocks: Tensor) -> Tensor:
    ql, qh, scales, d = _fields(blocks, 128, 64, 16, 2)
    scale = _half(d) * scales.contiguous().view(torch.int8).float()
    return _scaled(scale, (_nibbles(ql, 64) | (_bits(qh, 32, 2) << 4)).float() - 32)


KINDS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
"""By name: numbers a block, bytes a block, and blocks uint8 [n, bytes] → float32 [n, numbers]."""


def widen(kind: str, rows: Tensor) -> Tensor:
    """Rows of blocks, uint8 [N, bytes] → float32 [N, K]."""
    _, nbytes, function = KINDS[kind]
    return function(rows.reshape(-1, nbytes)).view(rows.shape[0], -1)
