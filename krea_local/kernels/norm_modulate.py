"""Residual, LayerNorm, modulation and quantisation in one pass over the rows (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea_local.kernels.rounding import rounded, scale_of
from krea_local.kernels.rows import EPS, LARGEST, SMALLEST_SCALE, Quantized, Rows

NUMBERS_A_THREAD = 16


# Not compiled anew for row counts that 16 divides: what was checked is what runs.
@triton.jit(do_not_specialize=["text_rows"])
def _kernel(
    x,
    y,
    gate,
    shift,
    scale,
    out,
    out_scale,
    text_rows,
    y_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    width: tl.constexpr,
    block: tl.constexpr,
    residual: tl.constexpr,
    quantized: tl.constexpr,
    eps: tl.constexpr,
    largest: tl.constexpr,
    smallest_scale: tl.constexpr,
):
    """One row a program: a row of 3072 numbers stays in registers from the read to the write."""
    row = tl.program_id(0).to(tl.int64)
    stream = (row >= text_rows).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    number = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if residual:
        added = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
        by = tl.load(gate + stream * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is what is stored: rounded.
        moved = (number + by * added).to(x.dtype.element_ty)
        tl.store(x + row * width + column, moved, mask=inside)
        number = moved.to(tl.float32)
    mean = tl.sum(number, axis=0) / width
    centred = tl.where(inside, number - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normed = centred * tl.rsqrt(variance + eps)
    factor = tl.load(scale + stream * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + stream * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    result = normed * (1.0 + factor) + offset
    if quantized:
        size = scale_of(tl.max(tl.abs(result), axis=0), largest, smallest_scale)
        tl.store(out_scale + row, size)
        result = rounded(result, size, largest, out.dtype.element_ty)
    else:
        result = result.to(out.dtype.element_ty)
    tl.store(out + row * width + column, result, mask=inside)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, text_rows: int, eight_bit: torch.dtype | None = None
) -> Rows:
    """As `fallback.norm_modulate`."""
    return _launch(x, None, shift, shift, scale, text_rows, eight_bit)


def residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    text_rows: int,
    eight_bit: torch.dtype | None = None,
) -> Rows:
    """As `fallback.residual_norm_modulate`."""
    return _launch(x, y, gate, shift, scale, text_rows, eight_bit)


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    text_rows: int,
    eight_bit: torch.dtype | None,
) -> Rows:
    rows, width = x.shape
    assert x.is_contiguous()
    assert all(vector.stride(1) == 1 for vector in (gate, shift, scale))
    assert y is None or (y.shape == x.shape and y.stride(1) == 1)
    out: Rows
    if eight_bit is None:
        out = torch.empty_like(x)
    else:
        out = Quantized.empty(rows, width, eight_bit, x.device)
    values, out_scale = out if isinstance(out, Quantized) else (out, out)
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x,
        x if y is None else y,
        gate,
        shift,
        scale,
        values,
        out_scale,
        text_rows,
        0 if y is None else y.stride(0),
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        width=width,
        block=block,
        residual=y is not None,
        quantized=eight_bit is not None,
        eps=EPS,
        largest=0.0 if eight_bit is None else LARGEST[eight_bit],
        smallest_scale=SMALLEST_SCALE,
        num_warps=min(16, max(1, block // (32 * NUMBERS_A_THREAD))),
    )
    return out
