"""How fast a GPU copies and multiplies, by trying for a moment: what plans reckon with.

Knows nothing of models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from krea_local.kernels import PLAIN, triton_kernels
from krea_local.layers import EightBitLinear, Linear
from krea_local.memory import pin_tensors
from krea_local.plan import Rates

BYTES = 2**26  # that are copied
TOKENS, WIDTH = 4096, 3072  # of the products: FLUX.1's, in the middle of their sizes
TIMES = 3

logger = logging.getLogger(__name__)


def measure(
    device: torch.device,
    dtype: torch.dtype,
    eight_bit: torch.dtype | None = None,
    *,
    nbytes: int = BYTES,
    tokens: int = TOKENS,
) -> Rates | None:
    """Those of `device`, the best of some tries; None where trying fails.

    Takes some tens of milliseconds and about 260 MiB, which are given back.

    Args:
        device: where.
        dtype: of the products.
        eight_bit: of those in 8 bits, if there are such.
        nbytes: to copy.
        tokens: rows of the products.
    """
    # Triton launches on the thread's current GPU, wherever the tensors are.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current, torch.inference_mode():
            rates = _measure(device, dtype, nbytes, tokens)
            if eight_bit is not None:
                found = _measure_eight_bit(device, dtype, eight_bit, tokens)
                rates = replace(rates, eight_bit=found)
    except Exception:  # little memory, say: a plan without them is as good
        logger.info("no rates are known", exc_info=True)
        rates = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def _measure(device: torch.device, dtype: torch.dtype, nbytes: int, tokens: int) -> Rates:
    here = torch.empty(nbytes, dtype=torch.uint8)
    pin_tensors([here], device)
    there, other = torch.empty_like(here, device=device), torch.empty_like(here, device=device)
    # Never zeros: they take less power, so they run faster than weights do.
    x, weight = (torch.randn(n, WIDTH, device=device).to(dtype) for n in (tokens, 2 * WIDTH))

    def best(call: Callable[[], Tensor]) -> float:
        return min(_seconds(call, device) for _ in range(1 + TIMES))  # the first one starts things

    return Rates(
        copying=nbytes / best(lambda: there.copy_(here, non_blocking=True)),
        memory=2 * nbytes / best(lambda: other.copy_(there)),
        products=2 * tokens * 2 * WIDTH * WIDTH / best(lambda: x @ weight.t()),
    )


def _measure_eight_bit(
    device: torch.device, dtype: torch.dtype, eight_bit: torch.dtype, tokens: int
) -> float | None:
    """Operations a second; None where the product does not work."""
    try:
        kernels = triton_kernels() if device.type == "cuda" else PLAIN
        linear = Linear(WIDTH, 2 * WIDTH, device=device, dtype=dtype).requires_grad_(False)
        layer = EightBitLinear.of(linear, eight_bit, kernels, device)
        x = PLAIN.quantize(torch.randn(tokens, WIDTH, device=device), eight_bit=eight_bit)
        seconds = min(_seconds(lambda: layer.project(x), device) for _ in range(1 + TIMES))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # which the level that needs it finds too, and tells
        logger.info("no products in %s", eight_bit, exc_info=True)
        return None
    return 2 * tokens * 2 * WIDTH * WIDTH / seconds


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return float(start_event.elapsed_time(end)) / 1000
