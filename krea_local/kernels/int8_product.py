"""The matrix product of 8-bit integers, with its scales and bias in one pass (Triton)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea_local.kernels.rows import Quantized


class Tile(NamedTuple):
    """What one program computes, and how.

    Attributes:
        rows: of the result.
        outputs: columns of the result.
        inner: numbers of each row and column that are multiplied at a time.
        warps: of 32 threads.
        stages: of the pipeline; one less is how many times `inner` are in shared memory.
    """

    rows: int
    outputs: int
    inner: int
    warps: int
    stages: int


# Chosen by count for compute capability 8.0 and 8.6, not measured. A multiprocessor of an A100
# multiplies 2048 pairs a cycle and can read 128 bytes of shared memory, and 47 from the L2 cache at
# its share; a GeForce's multiplies half as many. LARGE: a warp has 64 × 64 results, for which half
# of what can be read from shared memory suffices, and 24 bytes a cycle from the L2 cache; 72 KiB
# of the 99 that a program may have on 8.6, and 239 … 243 registers a thread with Triton 3.3 … 3.7
# and 3.9. (128 × 256 needs less with most of them, and more than there are with 3.4 and 3.5.)
# SMALL: 75 % and 48 bytes, for products too small to occupy a GPU otherwise; 36 KiB and 142 … 150
# registers, so that a multiprocessor has three at a time.
LARGE = Tile(256, 128, 64, warps=8, stages=4)
SMALL = Tile(64, 128, 64, warps=4, stages=4)
FEW_TILES = 108  # multiprocessors of an A100: with fewer large tiles some would have none
GROUP = 8  # rows of tiles that are computed together, since they share what the L2 cache holds


# Not compiled anew for row counts that 16 divides: what was checked is what runs. Nor for scales
# that begin anywhere, as those of some of a call's rows do.
@triton.jit(do_not_specialize=["rows", "x_scale"])
def _kernel(
    x,
    x_scale,
    weight,
    scale,
    bias,
    out,
    rows,
    outputs,
    inner,
    x_stride,
    weight_stride,
    out_stride,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inner: tl.constexpr,
    group: tl.constexpr,
    whole: tl.constexpr,
):
    """One tile a program, as two halves side by side.

    With one product in the loop Triton keeps the next operands in registers, of 8 bits each: more
    than there are.
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, tile_rows)
    in_group = group * tl.cdiv(outputs, tile_outputs)
    above = program // in_group * group
    height = tl.minimum(row_tiles - above, group)
    first_row = (above + program % in_group % height) * tile_rows
    first_output = program % in_group // height * tile_outputs
    half: tl.constexpr = tile_outputs // 2

    # What is past the end is read from the last row or column, and not written.
    row = tl.minimum(tl.arange(0, tile_rows), rows - 1 - first_row)[:, None]
    output = tl.arange(0, half)
    last = outputs - 1 - first_output
    near, far = tl.minimum(output, last)[None, :], tl.minimum(half + output, last)[None, :]
    depth = tl.arange(0, tile_inner)
    x += first_row.to(tl.int64) * x_stride
    weight += first_output.to(tl.int64) * weight_stride
    left = x + row * x_stride + depth[None, :]
    near_right = weight + near * weight_stride + depth[:, None]
    far_right = weight + far * weight_stride + depth[:, None]
    near_sum = tl.zeros((tile_rows, half), dtype=tl.int32)
    far_sum = tl.zeros((tile_rows, half), dtype=tl.int32)
    for start in range(0, inner, tile_inner):
        if whole:
            a, b, c = tl.load(left), tl.load(near_right), tl.load(far_right)
        else:
            inside = depth < inner - start
            a = tl.load(left, mask=inside[None, :], other=0)
            b = tl.load(near_right, mask=inside[:, None], other=0)
            c = tl.load(far_right, mask=inside[:, None], other=0)
        near_sum = tl.dot(a, b, near_sum, out_dtype=tl.int32)
        far_sum = tl.dot(a, c, far_sum, out_dtype=tl.int32)
        left += tile_inner
        near_right += tile_inner
        far_right += tile_inner

    rows -= first_row
    x_scale += first_row
    out += first_row.to(tl.int64) * out_stride
    _write(near_sum, x_scale, scale, bias, out, rows, first_output, outputs, out_stride)
    _write(far_sum, x_scale, scale, bias, out, rows, first_output + half, outputs, out_stride)


@triton.jit
def _write(total, x_scale, scale, bias, out, rows, first_output, outputs, out_stride):
    """Scale, add the bias, round once."""
    row = tl.arange(0, total.shape[0])
    output = first_output + tl.arange(0, total.shape[1])
    row_inside, output_inside = row < rows, output < outputs
    of_row = tl.load(x_scale + row, mask=row_inside, other=0.0)
    of_output = tl.load(scale + output, mask=output_inside, other=0.0)
    offset = tl.load(bias + output, mask=output_inside, other=0.0).to(tl.float32)
    result = total.to(tl.float32) * of_row[:, None] * of_output[None, :] + offset[None, :]
    tl.store(
        out + row[:, None] * out_stride + output[None, :],
        result.to(out.dtype.element_ty),
        mask=row_inside[:, None] & output_inside[None, :],
    )


def int8_product(
    x: Quantized, weight: Quantized, bias: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """As `fallback.int8_product`."""
    rows, inner = x.values.shape
    outputs = weight.values.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=bias.dtype, device=bias.device)
    assert out.shape == (rows, outputs)
    assert all(matrix.stride(1) == 1 for matrix in (x.values, weight.values, out))
    assert all(vector.is_contiguous() for vector in (x.scale, weight.scale, bias))
    tile = tile_of(rows, outputs)
    _kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        x.values,
        x.scale,
        weight.values,
        weight.scale,
        bias,
        out,
        rows,
        outputs,
        inner,
        x.values.stride(0),
        weight.values.stride(0),
        out.stride(0),
        tile_rows=tile.rows,
        tile_outputs=tile.outputs,
        tile_inner=tile.inner,
        group=GROUP,
        whole=inner % tile.inner == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def tile_of(rows: int, outputs: int) -> Tile:
    """How a product of this shape is divided."""
    large = triton.cdiv(rows, LARGE.rows) * triton.cdiv(outputs, LARGE.outputs)
    return SMALL if large < FEW_TILES else LARGE
