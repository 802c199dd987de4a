"""GELU and quantisation in one pass, joining two matrices on the way (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea_local.kernels.rounding import rounded, scale_of
from krea_local.kernels.rows import LARGEST, SMALLEST_SCALE, Quantized, Rows

NUMBERS_A_THREAD = 16


@triton.jit
def _kernel(
    before,
    x,
    out,
    out_scale,
    before_stride,
    x_stride,
    before_width: tl.constexpr,
    width: tl.constexpr,
    before_block: tl.constexpr,
    block: tl.constexpr,
    activate: tl.constexpr,
    quantized: tl.constexpr,
    largest: tl.constexpr,
    smallest_scale: tl.constexpr,
):
    """One row a program. GELU by the identity (1 + tanh u) / 2 = sigmoid 2u."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    number = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if activate:
        inner = 1.5957691216057308 * (number + 0.044715 * number * number * number)
        number = number * tl.sigmoid(inner)  # 2 sqrt(2 / pi) = 1.5957…
    target = out + row * (before_width + width)
    size = 1.0
    if before_width > 0:
        early = tl.arange(0, before_block)
        early_inside = early < before_width
        first = tl.load(before + row * before_stride + early, mask=early_inside, other=0.0).to(
            tl.float32
        )
        if quantized:
            size = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(number), axis=0))
            size = scale_of(size, largest, smallest_scale)
            first = rounded(first, size, largest, out.dtype.element_ty)
        else:
            first = first.to(out.dtype.element_ty)
        tl.store(target + early, first, mask=early_inside)
    elif quantized:
        size = scale_of(tl.max(tl.abs(number), axis=0), largest, smallest_scale)
    if quantized:
        tl.store(out_scale + row, size)
        number = rounded(number, size, largest, out.dtype.element_ty)
    else:
        number = number.to(out.dtype.element_ty)
    tl.store(target + before_width + column, number, mask=inside)


def gelu(x: Tensor, before: Tensor | None = None, *, eight_bit: torch.dtype | None = None) -> Rows:
    """As `fallback.gelu`."""
    return _launch(x, before, activate=True, eight_bit=eight_bit)


def quantize(x: Tensor, *, eight_bit: torch.dtype) -> Quantized:
    """As `fallback.quantize`."""
    out = _launch(x, None, activate=False, eight_bit=eight_bit)
    assert isinstance(out, Quantized)
    return out


def _launch(
    x: Tensor, before: Tensor | None, *, activate: bool, eight_bit: torch.dtype | None
) -> Rows:
    rows, width = x.shape
    early = 0 if before is None else before.shape[1]
    assert x.stride(1) == 1
    assert before is None or before.stride(1) == 1
    out: Rows
    if eight_bit is None:
        out = torch.empty(rows, early + width, dtype=x.dtype, device=x.device)
    else:
        out = Quantized.empty(rows, early + width, eight_bit, x.device)
    values, out_scale = out if isinstance(out, Quantized) else (out, out)
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x if before is None else before,
        x,
        values,
        out_scale,
        0 if before is None else before.stride(0),
        x.stride(0),
        before_width=early,
        width=width,
        before_block=triton.next_power_of_2(max(early, 1)),
        block=block,
        activate=activate,
        quantized=eight_bit is not None,
        largest=0.0 if eight_bit is None else LARGEST[eight_bit],
        smallest_scale=SMALLEST_SCALE,
        num_warps=min(16, max(1, block // (32 * NUMBERS_A_THREAD))),
    )
    return out
