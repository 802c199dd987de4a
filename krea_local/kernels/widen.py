"""Packed weights widened in one pass: a byte or less is read and a number written (Triton).

Every number is computed by itself, with the operations of plain torch in their order and unfused,
so that the results are the same bit for bit. What a block's numbers share each reads, from cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea_local.kernels import ggml
from krea_local.kernels.rows import CODES, TABLE, Parts

RUN = 16  # numbers that share all scales, in every kind
RUNS = 64  # a program; all of FLUX.1's layers have a multiple of it
WARPS = 4


@triton.jit
def _half(codes, index):
    """A half-precision number of the codes, by its place among such."""
    return tl.load(codes.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)


@triton.jit
def _byte(codes, index):
    return tl.load(codes + index).to(tl.int32)


@triton.jit
def _signed(codes, index):
    """A byte of the codes as a signed number."""
    number = tl.load(codes + index).to(tl.int32)
    return ((number ^ 128) - 128).to(tl.float32)


@triton.jit
def _float8_e4m3(code):
    """By way of a half: the same fields, but for the exponent's bias."""
    half = (((code & 128) << 8) | ((code & 127) << 7)).to(tl.int16)
    number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 127) == 127, float("nan"), number)


@triton.jit
def _float8_e5m2(code):
    return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _k_scale(codes, at, group):
    """One of the 8 scales of 6 bits in twelve bytes from `at`."""
    low, high = _byte(codes, at + group % 4), _byte(codes, at + 8 + group % 4)
    return tl.where(group < 4, low & 63, (high & 15) | ((low >> 2) & 48)).to(tl.float32)


@triton.jit
def _k_least(codes, at, group):
    """One of the 8 minima there."""
    middle, high = _byte(codes, at + 4 + group % 4), _byte(codes, at + 8 + group % 4)
    return tl.where(group < 4, middle & 63, (high >> 4) | ((middle >> 2) & 48)).to(tl.float32)


@triton.jit
def _of_32(codes, b, j, k, kind: tl.constexpr, nbytes: tl.constexpr):
    """Numbers j + k of 32 in block b, of the kinds with such blocks."""
    at, half = b * nbytes, b * (nbytes // 2)
    shift = (j // 16) * 4
    d = _half(codes, half)
    if kind == "Q8_0":
        number = d * _signed(codes, at + 2 + j + k)
    elif kind == "Q4_0":
        code = (_byte(codes, at + 2 + k) >> shift) & 15
        number = d * (code - 8).to(tl.float32)
    elif kind == "Q4_1":
        code = (_byte(codes, at + 4 + k) >> shift) & 15
        number = d * code.to(tl.float32) + _half(codes, half + 1)
    elif kind == "Q5_0":
        code = (_byte(codes, at + 6 + k) >> shift) & 15
        code |= ((_byte(codes, at + 2 + j // 8 + k // 8) >> (k % 8)) & 1) << 4
        number = d * (code - 16).to(tl.float32)
    else:
        tl.static_assert(kind == "Q5_1")
        code = (_byte(codes, at + 8 + k) >> shift) & 15
        code |= ((_byte(codes, at + 4 + j // 8 + k // 8) >> (k % 8)) & 1) << 4
        number = d * code.to(tl.float32) + _half(codes, half + 1)
    return number


@triton.jit
def _of_256(codes, b, j, k, kind: tl.constexpr, nbytes: tl.constexpr):
    """Numbers j + k of 256 in block b, of the kinds with such blocks."""
    at, half = b * nbytes, b * (nbytes // 2)
    pair, quarter = (j // 128) * 32 + j % 32 + k, ((j // 32) % 4) * 2
    nibble, upper = (j // 64) * 32 + j % 32 + k, ((j // 32) % 2) * 4
    if kind == "Q2_K":
        scale = _byte(codes, at + j // 16)
        least = _half(codes, half + 41) * (scale >> 4).to(tl.float32)
        code = (_byte(codes, at + 16 + pair) >> quarter) & 3
        number = _half(codes, half + 40) * (scale & 15).to(tl.float32) * code.to(tl.float32) - least
    elif kind == "Q3_K":
        group = j // 16
        low = (_byte(codes, at + 96 + group % 8) >> ((group // 8) * 4)) & 15
        high = (_byte(codes, at + 104 + group % 4) >> ((group // 4) * 2)) & 3
        scale = _half(codes, half + 54) * ((low | (high << 4)) - 32).to(tl.float32)
        code = (_byte(codes, at + 32 + pair) >> quarter) & 3
        code -= 4 - 4 * ((_byte(codes, at + j % 32 + k) >> (j // 32)) & 1)
        number = scale * code.to(tl.float32)
    elif kind == "Q6_K":
        scale = _half(codes, half + 104) * _signed(codes, at + 192 + j // 16)
        low = _byte(codes, at + (j // 128) * 64 + j % 64 + k) >> (((j // 64) % 2) * 4)
        high = (_byte(codes, at + 128 + pair) >> quarter) & 3
        number = scale * (((low & 15) | (high << 4)) - 32).to(tl.float32)
    else:
        group = j // 32
        scale = _half(codes, half) * _k_scale(codes, at + 4, group)
        least = _half(codes, half + 1) * _k_least(codes, at + 4, group)
        if kind == "Q4_K":
            code = (_byte(codes, at + 16 + nibble) >> upper) & 15
        else:
            tl.static_assert(kind == "Q5_K")
            code = (_byte(codes, at + 48 + nibble) >> upper) & 15
            code |= ((_byte(codes, at + 16 + j % 32 + k) >> group) & 1) << 4
        number = scale * code.to(tl.float32) - least
    return number


@triton.jit
def _kernel(
    codes,
    other,
    table,
    out,
    kind: tl.constexpr,
    size: tl.constexpr,
    nbytes: tl.constexpr,
    runs: tl.constexpr,
    run: tl.constexpr,
):
    """So many runs of numbers a program; what a run has in common is computed once.

    `size`: numbers of a row or block, which share a scale; `nbytes`: of a block's codes.
    """
    start = (tl.program_id(0) * runs + tl.arange(0, runs)[:, None]) * run
    k = tl.arange(0, run)[None, :]
    i, b = start + k, start // size
    if kind == "e4m3":
        number = _float8_e4m3(_byte(codes, i)) * tl.load(other + b)
    elif kind == "e5m2":
        number = _float8_e5m2(_byte(codes, i)) * tl.load(other + b)
    elif kind == "4bit":
        code = (_byte(codes, i // 2) >> (4 - (k % 2) * 4)) & 15
        number = tl.load(table + code) * tl.load(other + b)
    elif size == 32:
        number = _of_32(codes, b, start % 32, k, kind, nbytes)
    else:
        number = _of_256(codes, b, start % 256, k, kind, nbytes)
    tl.store(out + i, number.to(out.dtype.element_ty))


def widen(kind: str, parts: Parts, out: Tensor) -> Tensor:
    """As `fallback.widen`."""
    tensors, constants = arguments(kind, parts, out)
    count = out.numel() // (constants["runs"] * constants["run"])
    # Unfused, since fusing rounds once less than plain torch.
    _kernel[(count,)](*tensors, **constants, num_warps=WARPS, enable_fp_fusion=False)
    return out


def arguments(
    kind: str, parts: Parts, out: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """What the kernel is launched with: tensors and constants.

    Codes are bytes, whatever they stand for: GPUs before 8.9 know no 8-bit floats.
    """
    codes = parts[CODES].view(torch.uint8)
    count, columns = out.numel(), out.shape[1]
    other = table = codes
    nbytes = 0
    if kind == "float8":
        kind = "e4m3" if parts[CODES].dtype == torch.float8_e4m3fn else "e5m2"
        other, size = parts["scale"], columns
    elif kind == "4bit":
        other, table = parts["largest"], parts[TABLE]
        size = columns // other.shape[1]
    else:
        size, nbytes, _ = ggml.KINDS[kind]
    tensors = codes, other, table, out
    assert all(tensor.is_contiguous() for tensor in tensors)
    run = min(RUN, _power_of_two_in(size))
    runs = min(RUNS, _power_of_two_in(count // run))  # which leaves no edge to mask
    return tensors, {"kind": kind, "size": size, "nbytes": nbytes, "runs": runs, "run": run}


def _power_of_two_in(number: int) -> int:
    """The largest that divides it."""
    return number & -number
