"""RMSNorm and rotary position of queries and keys, written in attention's order (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from krea_local.kernels.rows import EPS, Layout

HEADS_A_PROGRAM = 8


# Not compiled anew for lengths that 16 divides: what was checked is what runs.
@triton.jit(do_not_specialize=["text_rows", "text_len", "image_len"])
def _kernel(
    qkv,
    text_query_norm,
    image_query_norm,
    text_key_norm,
    image_key_norm,
    cos,
    sin,
    query,
    key,
    value,
    qkv_stride,
    text_rows,
    text_len,
    image_len,
    heads: tl.constexpr,
    dim: tl.constexpr,
    block: tl.constexpr,
    copy_value: tl.constexpr,
    eps: tl.constexpr,
):
    """`block` heads of one row a program; queries and keys share the angles."""
    row = tl.program_id(0).to(tl.int64)
    is_image = row >= text_rows
    image_row = row - text_rows
    batch = tl.where(is_image, image_row // image_len, row // text_len)
    position = tl.where(is_image, text_len + image_row % image_len, row % text_len)
    half: tl.constexpr = dim // 2
    angle = position * half + tl.arange(0, half)
    c = tl.load(cos + angle)[None, :]
    s = tl.load(sin + angle)[None, :]

    head = tl.program_id(1) * block + tl.arange(0, block)
    inside = (head < heads)[:, None]
    lane = tl.arange(0, dim)
    within = head[:, None] * dim + lane[None, :]  # [block, dim]
    source = qkv + row * qkv_stride + within
    target = (batch * (text_len + image_len) + position) * (heads * dim) + within
    for part in tl.static_range(2):
        number = tl.load(source + part * heads * dim, mask=inside, other=0.0).to(tl.float32)
        if part == 0:
            weight = tl.load(tl.where(is_image, image_query_norm, text_query_norm) + lane)
        else:
            weight = tl.load(tl.where(is_image, image_key_norm, text_key_norm) + lane)
        power = tl.sum(number * number, axis=1)[:, None] / dim
        normed = number * tl.rsqrt(power + eps) * weight.to(tl.float32)[None, :]
        real, imaginary = tl.split(tl.reshape(normed, [block, half, 2]))
        turned = tl.join(real * c - imaginary * s, imaginary * c + real * s)
        turned = tl.reshape(turned, [block, dim])
        if part == 0:
            tl.store(query + target, turned.to(query.dtype.element_ty), mask=inside)
        else:
            tl.store(key + target, turned.to(key.dtype.element_ty), mask=inside)
    if copy_value:
        copied = tl.load(source + 2 * heads * dim, mask=inside, other=0.0)
        tl.store(value + target, copied, mask=inside)


def qk_norm_rotary(
    qkv: Tensor,
    query_norms: tuple[Tensor, Tensor],
    key_norms: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fallback.qk_norm_rotary`; d must be a power of 2."""
    dim = query_norms[0].shape[0]
    heads = qkv.shape[1] // (3 * dim)
    assert qkv.stride(1) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    shape = (layout.batch, layout.text + layout.image, heads, dim)
    query, key = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    alone = layout.batch == 1
    value = (
        qkv[:, 2 * heads * dim :].unflatten(1, (heads, dim))[None]
        if alone
        else torch.empty_like(query)
    )
    block = min(HEADS_A_PROGRAM, triton.next_power_of_2(heads))
    _kernel[(layout.rows, triton.cdiv(heads, block))](
        qkv,
        *query_norms,
        *key_norms,
        cos,
        sin,
        query,
        key,
        value,
        qkv.stride(0),
        layout.text_rows,
        layout.text,
        layout.image,
        heads=heads,
        dim=dim,
        block=block,
        copy_value=not alone,
        eps=EPS,
        num_warps=4,
    )
    return query, key, value
