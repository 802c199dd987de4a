"""Attention: the implementations there are, and which one a GPU gets.

Each is called directly, so that no setting of the process changes: diffusers' and torch's own
switches are global, and not restored after an error. Knows nothing of weights or levels.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attention:
    """One implementation.

    Attributes:
        name: what benchmarks and notices call it.
        run: (query, key, value), each [B, N, H, d] with d contiguous → [B, N, H, d].
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


def _default(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What torch chooses: on CUDA its flash attention."""
    joined = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return joined.transpose(1, 2)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    operation: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    joined: Tensor = operation(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, False
    )[0]
    return joined.transpose(1, 2)


def _flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    operation: Any = importlib.import_module("fa3_fwd_interface").flash_attn_func
    found = operation(query, key, value)
    joined: Tensor = found[0] if isinstance(found, tuple) else found
    return joined


DEFAULT = Attention("torch", _default)
CUDNN = Attention("cudnn", _cudnn)
FLASH3 = Attention("fa3", _flash3)


def candidates(capability: tuple[int, int]) -> tuple[Attention, ...]:
    """What may be fastest on a GPU, best first; a table, so that a seed's picture stays the same.

    On Hopper (9.0) cuDNN reaches 631 TFLOP/s and torch's flash attention 330 at (1, 24, 4608, 128)
    (pytorch 142132); FlashAttention 3, if the package fa3-fwd is there, is of Hopper alone. cuDNN's
    kernels for older GPUs are no faster than torch's.
    """
    if capability == (9, 0):
        return FLASH3, CUDNN, DEFAULT
    if capability >= (10, 0):
        return CUDNN, DEFAULT
    return (DEFAULT,)


def choose(
    device: torch.device, dtype: torch.dtype, *, head_dim: int
) -> tuple[Attention, str | None]:
    """The first candidate that works on `device`, and what failed before it, if not just absent."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return DEFAULT, None
    failed: list[str] = []
    for one in candidates(torch.cuda.get_device_capability(device)):
        if one is DEFAULT:
            break
        try:
            if one is FLASH3 and importlib.util.find_spec("fa3_fwd_interface") is None:
                continue
            check(one, device, dtype, head_dim=head_dim)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # half installed, built for another torch, no kernel for d, ...
            logger.info("attention %s is not used: %s", one.name, error, exc_info=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            failed.append(f"attention {one.name} does not work here, slower: {reason}")
            continue
        return one, "; ".join(failed) or None
    return DEFAULT, "; ".join(failed) or None


def check(one: Attention, device: torch.device, dtype: torch.dtype, *, head_dim: int) -> None:
    """Compare with attention written out.

    Raises:
        ValueError: the result differs by more than rounding, or has another shape.
    """
    random = torch.Generator("cpu").manual_seed(0)
    fused = torch.randn(1, 200, 3, 2, head_dim, generator=random).to(device, dtype)
    query, key, value = fused.unbind(2)  # views with strides, as in use
    scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) / head_dim**0.5
    wanted = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value.float())
    found = one.run(query, key, value).float()
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= 1e-2:  # bfloat16 gives 3e-3
        raise ValueError(f"differs by {error:.1e}")
