"""Rounding to 8 bits, within a kernel (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

HALVES_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2^23: added to it, float32 has no fraction left


@triton.jit
def scale_of(most, largest: tl.constexpr, smallest_scale: tl.constexpr):
    """By what a row is divided whose largest number is `most`. As plain torch, which `/` is not."""
    return tl.maximum(tl.div_rn(most, tl.full([], largest, tl.float32)), smallest_scale)


@triton.jit
def rounded(number, size, largest: tl.constexpr, dtype: tl.constexpr):
    """float32 `number / size` as `dtype`, float8_e4m3fn or int8, within ±`largest`."""
    number = tl.div_rn(number, size)
    if dtype == tl.int8:  # of which Triton would cut the fraction off
        number = number + HALVES_TO_EVEN - HALVES_TO_EVEN
    return tl.minimum(tl.maximum(number, -largest), largest).to(dtype)
