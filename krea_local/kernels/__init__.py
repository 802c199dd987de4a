"""The fused operations between FLUX.1's matrix products, and the choice of who runs them.

Each exists as a Triton kernel, one subject a file, and in plain torch (`fallback.py`), with equal
signatures; torch.compile can also make kernels of the latter, for a GPU that Triton's were not
written for. They are memory-bound: what they save is passes over the rows. `choose` checks every
kernel against plain torch on the very GPU before it is used, so that a kernel that fails to compile
or computes something else there costs speed, never a picture.

Launch parameters follow from the width alone, so there is nothing to tune at run time and a new
size costs nothing; Triton and torch.compile keep what they compiled on disk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from krea_local.kernels import fallback
from krea_local.kernels.rows import Layout, Quantized, Rows, part

__all__ = ["PLAIN", "Kernels", "Layout", "Quantized", "Rows", "choose", "part"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The fused operations; their signatures are documented in `fallback`."""

    name: Literal["torch", "triton", "compiled"]
    norm_modulate: Callable[..., Rows]
    residual_norm_modulate: Callable[..., Rows]
    qk_norm_rotary: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gelu: Callable[..., Rows]
    quantize: Callable[..., Quantized]
    int8_product: Callable[..., Tensor]
    widen: Callable[..., Tensor]


PLAIN = Kernels(
    name="torch",
    norm_modulate=fallback.norm_modulate,
    residual_norm_modulate=fallback.residual_norm_modulate,
    qk_norm_rotary=fallback.qk_norm_rotary,
    gelu=fallback.gelu,
    quantize=fallback.quantize,
    int8_product=fallback.int8_product,
    widen=fallback.widen,
)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    head_dim: int,
    eight_bit: torch.dtype | None = None,
    compiled: bool = False,
) -> tuple[Kernels, str | None]:
    """The fastest operations that are right on `device`, and why they are plain torch's, if so.

    Args:
        device: where they will run. Triton is for CUDA; elsewhere plain torch needs no excuse.
        dtype: of the activations.
        heads: attention heads of the model.
        head_dim: numbers a head.
        eight_bit: check the variants that quantise to this too.
        compiled: have torch.compile make them, on any device, instead of Triton's own.
    """
    if device.type != "cuda" and not compiled:
        return PLAIN, None
    try:
        kernels = compiled_kernels() if compiled else triton_kernels()
        check(kernels, device, dtype, heads=heads, head_dim=head_dim, eight_bit=eight_bit)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, a GPU that Triton does not know, ...
        wanted = "torch.compile's" if compiled else "Triton"
        logger.info("%s kernels are not used: %s", wanted, error, exc_info=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return PLAIN, f"plain torch operations run instead of {wanted} kernels, slower: {reason}"
    return kernels, None


def triton_kernels() -> Kernels:
    """The Triton kernels.

    Raises:
        ImportError: no Triton here.
    """
    from krea_local.kernels import gelu, int8_product, norm_modulate, qk_norm_rotary, widen

    return Kernels(
        name="triton",
        norm_modulate=norm_modulate.norm_modulate,
        residual_norm_modulate=norm_modulate.residual_norm_modulate,
        qk_norm_rotary=qk_norm_rotary.qk_norm_rotary,
        gelu=gelu.gelu,
        quantize=gelu.quantize,
        int8_product=int8_product.int8_product,
        widen=widen.widen,
    )


@functools.cache  # torch.compile keeps what it compiled with the function that it returns
def compiled_kernels() -> Kernels:
    """Plain torch, compiled operation by operation for any number of rows."""
    compiled = {
        name: torch.compile(getattr(PLAIN, name), dynamic=True, fullgraph=True)
        for name in (field.name for field in fields(Kernels))
        if name not in ("name", "widen")
    }
    return Kernels(name="compiled", widen=PLAIN.widen, **compiled)


def check(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    head_dim: int,
    eight_bit: torch.dtype | None,
) -> None:
    """Run every operation once at the model's width, against plain torch; this compiles them too.

    All but the product of integers, which `layers.check_product` tries: without it, or with another
    one, the others are as good.

    Raises:
        ValueError: a result differs by more than rounding.
    """
    if kernels.name == "triton" and head_dim & (head_dim - 1):
        raise ValueError(f"heads of {head_dim} numbers: should be a power of 2")
    layout = Layout(batch=2, text=3, image=5)
    rows, width = layout.rows, heads * head_dim
    random = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    x, y, fused = draw(rows, width), draw(rows, width), draw(rows, 7 * width)
    gate, shift, scale = draw(2, 3, width).unbind(1)
    norms = [draw(head_dim) for _ in range(4)]
    pairs = (norms[0], norms[1]), (norms[2], norms[3])
    angles = draw(layout.text + layout.image, head_dim // 2).float()
    cos, sin = angles.cos(), angles.sin()
    lonely = Layout(batch=1, text=3, image=13)
    far = draw(16, head_dim // 2).float()

    def results(ops: Kernels) -> list[Rows]:
        moved = x.clone()
        found: list[Rows] = [
            ops.norm_modulate(x, shift, scale, text_rows=6),
            ops.residual_norm_modulate(moved, y, gate, shift, scale, text_rows=6),
            moved,
            *ops.qk_norm_rotary(fused[:, : 3 * width], *pairs, cos, sin, layout=layout),
            *ops.qk_norm_rotary(fused[:, : 3 * width], *pairs, far.cos(), far.sin(), layout=lonely),
            ops.gelu(fused[:, 3 * width :]),
            ops.gelu(fused[:, 3 * width :], x),
        ]
        if eight_bit is not None:
            moved, to = x.clone(), {"eight_bit": eight_bit}
            found += [
                ops.quantize(x, **to),  # attention's result, and weights of every width
                ops.quantize(fused[:, : 4 * width].contiguous(), **to),
                ops.quantize(fused[:, : 5 * width].contiguous(), **to),
                ops.norm_modulate(x, shift, scale, text_rows=6, **to),
                ops.residual_norm_modulate(moved, y, gate, shift, scale, text_rows=6, **to),
                ops.gelu(fused[:, 3 * width :], **to),
                ops.gelu(fused[:, 3 * width :], x, **to),
            ]
        return found

    for i, (ours, wanted) in enumerate(zip(results(kernels), results(PLAIN), strict=True)):
        # 8-bit floats have 3 bits of fraction: another rounding now and then moves one by 1 / 8,
        # and an integer by 1 / 127 of the row's largest.
        allowed = 1e-2 if isinstance(wanted, Quantized) or dtype != torch.float32 else 1e-4
        error = distance(ours, wanted)
        if not error <= allowed:  # also where it is NaN
            raise ValueError(f"operation {i} of {kernels.name} differs by {error:.1e} on {device}")


def distance(one: Rows, other: Rows) -> float:
    """Relative L2 distance of two results."""
    a, b = dequantized(one), dequantized(other)
    return float((a - b).norm() / b.norm())


def dequantized(rows: Rows) -> Tensor:
    """The numbers, in float32."""
    if isinstance(rows, Quantized):
        return rows.values.float() * rows.scale
    return rows.float()
