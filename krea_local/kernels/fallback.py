"""Every fused operation in plain torch: what runs without Triton, and what the kernels must equal.

As in the kernels, arithmetic is in float32 and each result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from krea_local.kernels import ggml
from krea_local.kernels.rows import (
    CODES,
    EPS,
    INT8,
    LARGEST,
    SMALLEST_SCALE,
    TABLE,
    Layout,
    Parts,
    Quantized,
    Rows,
)

AT_ONCE = 2**23  # numbers that are widened at a time


def quantize(x: Tensor, *, eight_bit: torch.dtype) -> Quantized:
    """Each row of x [R, K] in 8 bits, its largest number at their end.

    Args:
        x: [R, K].
        eight_bit: float8_e4m3fn or int8; either is rounded to the nearest, halves to even.
    """
    number, largest = x.float(), LARGEST[eight_bit]
    scale = (number.abs().amax(dim=1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
    out = Quantized.empty(x.shape[0], x.shape[1], eight_bit, x.device)
    out.scale.copy_(scale)
    number = number / scale
    if eight_bit == INT8:
        number = number.round()
    out.values.copy_(number.clamp(-largest, largest).to(eight_bit))
    return out


def int8_product(
    x: Quantized, weight: Quantized, bias: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias, of integers: their sum is exact, and the result rounded once.

    Args:
        x: int8 [R, K].
        weight: int8 [N, K].
        bias: [N], in the precision of the result.
        out: [R, N], into which the result is written: some rows or columns of a matrix.
    """
    total = _exact_product(x.values, weight.values).float()
    result = total.mul_(x.scale).mul_(weight.scale.t()).add_(bias.float()).to(bias.dtype)
    return result if out is None else out.copy_(result)


def _exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [R, K] and [N, K] → int32 [R, N]."""
    rows, inner = x.shape
    if x.is_cuda and rows > 16 and inner % 8 == 0 and weight.shape[0] % 8 == 0:
        return torch._int_mm(x, weight.t())
    # On many CPUs that product is a plain loop. 1024 · 127² fits into the 24 bits of float32.
    total = torch.zeros(rows, weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(1024, dim=1), weight.split(1024, dim=1), strict=True):
        total += (a.float() @ b.float().t()).int()
    return total


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, text_rows: int, eight_bit: torch.dtype | None = None
) -> Rows:
    """LayerNorm without weights, then `* (1 + scale) + shift`.

    Args:
        x: [R, D].
        shift: [2, D], for the rows of text and for those of the image.
        scale: [2, D], likewise.
        text_rows: how many rows are text; they come first.
        eight_bit: return the rows quantised to float8_e4m3fn or int8; None for as x is.
    """
    normed = F.layer_norm(x.float(), (x.shape[1],), eps=EPS)
    out = torch.empty_like(normed)
    for stream, rows in enumerate((slice(0, text_rows), slice(text_rows, None))):
        out[rows] = normed[rows] * (1 + scale[stream].float()) + shift[stream].float()
    return out.to(x.dtype) if eight_bit is None else quantize(out, eight_bit=eight_bit)


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
    """`x += gate * y` in place, then `norm_modulate` of the sum.

    Args:
        x: [R, D], the residual stream.
        y: [R, D], what a block adds.
        gate: [2, D], for the rows of text and for those of the image.
        shift: as for `norm_modulate`.
        scale: likewise.
        text_rows: likewise.
        eight_bit: likewise.
    """
    for stream, rows in enumerate((slice(0, text_rows), slice(text_rows, None))):
        moved = x[rows].float() + gate[stream].float() * y[rows].float()
        x[rows] = moved.to(x.dtype)
    return norm_modulate(x, shift, scale, text_rows=text_rows, eight_bit=eight_bit)


def qk_norm_rotary(
    qkv: Tensor,
    query_norms: tuple[Tensor, Tensor],
    key_norms: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and rotary position of queries and keys, and attention's order of tokens.

    Args:
        qkv: [R, 3 · H · d] or the first columns of a wider matrix.
        query_norms: weights [d] for the rows of text and for those of the image.
        key_norms: likewise.
        cos: float32 [L + S, d / 2].
        sin: likewise.
        layout: of the rows.

    Returns:
        query, key, value [B, L + S, H, d]; with one image the value is a view of `qkv`.
    """
    dim = query_norms[0].shape[0]
    parts = qkv.unflatten(1, (3, -1, dim))  # [R, 3, H, d]
    found = []
    for i, norms in enumerate((query_norms, key_norms)):
        streams = []
        for norm, rows in zip(
            norms, (slice(0, layout.text_rows), slice(layout.text_rows, None)), strict=True
        ):
            normed = F.rms_norm(parts[rows, i].float(), (dim,), norm.float(), EPS)
            streams.append(normed.unflatten(0, (layout.batch, -1)))
        pairs = torch.cat(streams, dim=1).unflatten(-1, (-1, 2))  # [B, N, H, d / 2, 2]
        real, imaginary = pairs.unbind(-1)
        c, s = cos[:, None], sin[:, None]
        turned = torch.stack((real * c - imaginary * s, imaginary * c + real * s), dim=-1)
        found.append(turned.flatten(-2).to(qkv.dtype))
    return found[0], found[1], tokens(parts[:, 2], layout)


def tokens(rows: Tensor, layout: Layout) -> Tensor:
    """Rows [R, …] → tokens [B, L + S, …], text first; a view if there is one image."""
    if layout.batch == 1:
        return rows[None]
    streams = (rows[: layout.text_rows], rows[layout.text_rows :])
    return torch.cat([one.unflatten(0, (layout.batch, -1)) for one in streams], dim=1)


def rows_of(joined: Tensor, layout: Layout) -> Tensor:
    """Tokens [B, L + S, …] → rows [R, …]: the way back from `tokens`."""
    if layout.batch == 1:
        return joined[0]
    return torch.cat(
        [joined[:, : layout.text].flatten(0, 1), joined[:, layout.text :].flatten(0, 1)]
    )


def gelu(x: Tensor, before: Tensor | None = None, *, eight_bit: torch.dtype | None = None) -> Rows:
    """GELU (tanh) of x [R, F], after the columns `before` [R, D] if given: [R, D + F]."""
    out = F.gelu(x.float(), approximate="tanh")
    if before is not None:
        out = torch.cat((before.float(), out), dim=1)
    return out.to(x.dtype) if eight_bit is None else quantize(out, eight_bit=eight_bit)


def widen(kind: str, parts: Parts, out: Tensor) -> Tensor:
    """A packed weight as plain numbers: each computed in float32, and rounded once.

    Args:
        kind: as `rows.Parts` has them.
        parts: likewise.
        out: [N, K], is written and returned.
    """
    step = max(1, AT_ONCE // out.shape[1])
    for start in range(0, out.shape[0], step):
        some = {
            name: part if name == TABLE else part[start : start + step]
            for name, part in parts.items()
        }
        out[start : start + step] = _widened(kind, some)
    return out


def _widened(kind: str, parts: Parts) -> Tensor:
    """All numbers of some rows, in float32."""
    codes = parts[CODES]
    if kind == "float8":
        numbers: Tensor = codes.float().mul_(parts["scale"][:, None])
        return numbers
    if kind == "4bit":
        places = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)
        largest = parts["largest"]
        runs = parts[TABLE].index_select(0, places.flatten().int()).view(*largest.shape, -1)
        wide: Tensor = runs.mul_(largest[:, :, None]).flatten(1)
        return wide
    return ggml.widen(kind, codes)
