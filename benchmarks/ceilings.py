"""What this GPU can do at the shapes of FLUX.1: products, attention, copies.

Every figure is a median of timed stretches (CUDA events; a clock on the CPU, where `scale` shrinks
the shapes so that the code can be rehearsed). Data is random and normal, never zeros, which run
13 % faster. Returns plain dicts for JSON; where a figure cannot be had, the reason is in its place.
Knows nothing of krea_local but its product of
integers, which stands beside torch's.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

Figure = float | str
"""A rate, or why there is none."""

Call = Callable[[], object]

cuda: Any = torch.cuda  # whose streams and events have no types

TOKENS = 4608  # 1024 x 1024: 4096 of the image, 512 of the prompt
# (N, K) of the linears: QKV, attention output, MLP up and down, QKV + MLP, output of both.
LINEARS = (
    *((9216, 3072), (3072, 3072), (12288, 3072)),
    *((3072, 12288), (21504, 3072), (3072, 15360)),
)
LENGTHS = (1536, 3584, 4608, 6912, 16896)  # 512², 1024x768, 1024², 1280², 2048², 512 of text
HEADS, HEAD_WIDTH = 24, 128
COPIED_BYTES = 2**29  # about one double block; PyTorch pins powers of two
WEIGHTS = 4  # taken in turn: one alone would stay in the L2 cache
STRETCHES = 5
FLOAT8_MAX = 448.0  # of e4m3
NO_GPU = "a copy to the GPU needs a GPU"


def gemm_rates(
    device: torch.device, seconds: float = 5.0, *, scale: int = 1
) -> dict[str, dict[str, Figure]]:
    """TFLOP/s of each linear with its bias, sustained over `seconds`: {kind: {"MxNxK": rate}}.

    float8 by `torch._scaled_mm` with fast accumulation, one scale a row or one a tensor; int8 by
    `torch._int_mm`, without scales and bias, and with them by our kernel, "int8_ours". Quantising
    the input is in none.

    Args:
        scale: divides every size, for a rehearsal.
    """
    kinds: dict[str, Callable[..., Call]] = {
        "bf16": _bf16_linear,
        "fp8_rowwise": partial(_float8_linear, rows=True),
        "fp8_tensorwise": partial(_float8_linear, rows=False),
        "int8": _int8_linear,
        "int8_ours": _our_int8_linear,
    }
    rates: dict[str, dict[str, Figure]] = {}
    for kind, prepare in kinds.items():
        rates[kind] = {}
        for n, k in LINEARS:
            shape = (TOKENS // scale, n // scale, k // scale)
            work = 2 * math.prod(shape) / 1e12
            rates[kind]["x".join(map(str, shape))] = _rate(
                partial(prepare, *shape, device), work, device, seconds
            )
    return rates


def attention_rates(
    device: torch.device, seconds: float = 1.0, *, scale: int = 1
) -> dict[str, dict[str, Figure]]:
    """TFLOP/s of attention over (1, 24, L, 128) in bf16 without a mask: {kernel: {"L": rate}}.

    "default_is" names the kernel that PyTorch chooses. Casting to float8 is not in "fa3_fp8".
    """
    kernels: dict[str, Callable[..., Call]] = {
        "default": _default_attention,
        "cudnn": _cudnn_attention,
        "flash": _flash_attention,
        "fa3": _fa3_attention,
        "fa3_fp8": partial(_fa3_attention, dtype=torch.float8_e4m3fn),
    }
    rates: dict[str, dict[str, Figure]] = {name: {} for name in ("default_is", *kernels)}
    for length in (length // scale for length in LENGTHS):
        # [B, L, H, D], as the model's linears leave them.
        qkv = [_normal((1, length, HEADS, HEAD_WIDTH), device) for _ in range(3)]
        rates["default_is"][str(length)] = _chosen_kernel(*qkv)
        work = 4 * length**2 * HEADS * HEAD_WIDTH / 1e12
        for name, prepare in kernels.items():
            rates[name][str(length)] = _rate(partial(prepare, *qkv), work, device, seconds)
    return rates


def copy_rates(device: torch.device, *, scale: int = 1) -> dict[str, Figure]:
    """GB/s (1e9 bytes) from pinned host memory to the GPU (h2d), and within the GPU.

    "device_to_device" counts bytes read and bytes written. "h2d_while_gemm" is the copy beside bf16
    products, "gemm_while_h2d" their TFLOP/s beside the copy, "gemm_alone" without it.
    """
    size = COPIED_BYTES // scale // 2  # of bf16
    source = [_normal((size,), device) for _ in range(2)]
    target = [torch.empty_like(tensor) for tensor in source]
    gb = source[0].nbytes / 1e9
    rates: dict[str, Figure] = {
        "device_to_device": _rate(
            lambda: partial(target[0].copy_, source[0]), 2 * gb, device, seconds=0.5
        )
    }
    if device.type != "cuda":
        figures = (
            *("h2d_one_stream", "h2d_two_streams"),
            *("h2d_while_gemm", "gemm_while_h2d", "gemm_alone"),
        )
        return rates | dict.fromkeys(figures, NO_GPU)
    host = [tensor.cpu().pin_memory() for tensor in source]
    copy = partial(target[0].copy_, host[0], non_blocking=True)
    product = _bf16_linear(TOKENS, 12288, 3072, device)
    flop = 2 * TOKENS * 12288 * 3072 / 1e12
    rates["h2d_one_stream"] = host_to_device_rate(device, scale=scale)
    rates["h2d_two_streams"] = _rate(
        lambda: _two_streams(target, host, device), 2 * gb, device, seconds=0.5
    )
    rates["h2d_while_gemm"] = _rate_beside(copy, product, gb, device)
    rates["gemm_while_h2d"] = _rate_beside(product, copy, flop, device)
    rates["gemm_alone"] = _rate(lambda: product, flop, device, seconds=0.5)
    return rates


def host_to_device_rate(device: torch.device, *, scale: int = 1) -> Figure:
    """GB/s (1e9 bytes) from pinned host memory to the GPU, on one stream with nothing beside it."""
    if device.type != "cuda":
        return NO_GPU
    count = COPIED_BYTES // scale // 2  # of bf16

    def prepare() -> Call:
        target = _normal((count,), device)
        return partial(target.copy_, target.cpu().pin_memory(), non_blocking=True)

    return _rate(prepare, 2 * count / 1e9, device, seconds=0.5)


def _bf16_linear(m: int, n: int, k: int, device: torch.device) -> Call:
    x, bias = _normal((m, k), device), _normal((n,), device)
    weights = cycle([_normal((n, k), device) for _ in range(WEIGHTS)])
    return lambda: linear(x, next(weights), bias)


def _float8_linear(m: int, n: int, k: int, device: torch.device, *, rows: bool) -> Call:
    x, x_scale = _float8(_normal((m, k), device), rows=rows)
    weights = cycle([_float8(_normal((n, k), device), rows=rows) for _ in range(WEIGHTS)])
    bias = _normal((n,), device)

    def call() -> Tensor:
        weight, weight_scale = next(weights)
        product: Tensor = torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale.t(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product

    return call


def _int8_linear(m: int, n: int, k: int, device: torch.device) -> Call:
    x, _ = _int8(_normal((m, k), device))
    weights = cycle([_int8(_normal((n, k), device))[0] for _ in range(WEIGHTS)])
    return lambda: torch._int_mm(x, next(weights).t())


def _our_int8_linear(m: int, n: int, k: int, device: torch.device) -> Call:
    from krea_local.kernels import Quantized
    from krea_local.kernels.int8_product import int8_product

    if device.type != "cuda":
        raise RuntimeError("needs a GPU")
    x, bias = Quantized(*_int8(_normal((m, k), device))), _normal((n,), device)
    weights = cycle([Quantized(*_int8(_normal((n, k), device))) for _ in range(WEIGHTS)])
    return lambda: int8_product(x, next(weights), bias)


def _int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    scale = tensor.abs().amax(dim=1, keepdim=True).float() / 127
    return (tensor.float() / scale).round().to(torch.int8), scale


def _float8(tensor: Tensor, *, rows: bool) -> tuple[Tensor, Tensor]:
    largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
    scale = largest.float() / FLOAT8_MAX
    return (tensor.float() / scale).to(torch.float8_e4m3fn), scale


def _default_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    return partial(scaled_dot_product_attention, *_heads_first(q, k, v))


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    return partial(kernel, *_heads_first(q, k, v), None, False)  # no mask, no log-sum-exp


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    attend = _default_attention(q, k, v)

    def call() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend()

    return call


def _fa3_attention(q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Call:
    kernel = importlib.import_module("fa3_fwd_interface").flash_attn_func
    return partial(kernel, q.to(dtype), k.to(dtype), v.to(dtype))


def _heads_first(*qkv: Tensor) -> Any:
    """[B, L, H, D] → [B, H, L, D], without a copy."""
    return (tensor.transpose(1, 2) for tensor in qkv)


def _chosen_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    chosen = torch._fused_sdp_choice(*_heads_first(q, k, v))
    return str(SDPBackend(chosen).name).lower()


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _two_streams(target: list[Tensor], host: list[Tensor], device: torch.device) -> Call:
    streams = [cuda.Stream(device) for _ in target]

    def call() -> None:
        here = cuda.current_stream(device)
        for stream, to, of in zip(streams, target, host, strict=True):
            stream.wait_stream(here)
            with cuda.stream(stream):
                to.copy_(of, non_blocking=True)
        for stream in streams:
            here.wait_stream(stream)

    return call


def _rate_beside(call: Call, other: Call, work: float, device: torch.device) -> Figure:
    """`work` per second of `call` while another stream is busy with `other`."""

    def measure() -> float:
        count = math.ceil(0.2 / _seconds_a_call(call, device, 0.2))
        # Longer than what is measured, but fewer launches than the driver queues (about 1000).
        others = math.ceil(0.35 / _seconds_a_call(other, device, 0.2))
        side = cuda.Stream(device)
        found = []
        for _ in range(STRETCHES):
            with cuda.stream(side):
                for _ in range(others):
                    other()
            found.append(_stretch(call, count, device) / count)
        return work / statistics.median(found)

    return _or_reason(measure)


def _rate(prepare: Callable[[], Call], work: float, device: torch.device, seconds: float) -> Figure:
    """`work` per second of the call that `prepare` makes ready."""
    return _or_reason(lambda: work / _seconds_a_call(prepare(), device, seconds))


def _or_reason(measure: Callable[[], float]) -> Figure:
    try:
        return measure()
    except Exception as error:  # each kernel refuses in its own way; the others are still measured
        reason = " ".join(str(error).split())
        return f"{type(error).__name__}: {reason[:200]}"


def _seconds_a_call(call: Call, device: torch.device, seconds: float) -> float:
    """The median over stretches that take `seconds` together."""
    for _ in range(3):
        call()
    once = _stretch(call, 3, device) / 3
    count = max(1, round(seconds / STRETCHES / once))
    return statistics.median(_stretch(call, count, device) / count for _ in range(STRETCHES))


def _stretch(call: Call, count: int, device: torch.device) -> float:
    """Seconds that `count` calls in a row take."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start
    first, last = (cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000
