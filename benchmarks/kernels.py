"""Every fused operation alone, at FLUX.1's width: `python -m benchmarks.kernels`.

Microseconds and GB/s of the Triton kernels at several launch parameters, beside plain torch, beside
torch.compile with `--compile`, and beside a copy within the GPU, which is their ceiling. The last
line of the output is one JSON object. Without a GPU the kernels run in Triton's interpreter, which
is for seeing that this works: take few tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import random_model
from krea_local import kernels
from krea_local.info import versions
from krea_local.kernels import Kernels, Layout, Quantized
from krea_local.speed import eight_bit_of

# (module of krea_local.kernels, constant, values): the constant as it is comes first.
SETS = 4
TUNABLE = {
    "norm_modulate": ("NUMBERS_A_THREAD", (16, 8, 32)),
    "gelu": ("NUMBERS_A_THREAD", (16, 32, 64)),
    "qk_norm_rotary": ("HEADS_A_PROGRAM", (8, 4, 16, 32)),
    "widen": ("RUNS", (64, 32, 128)),
}
MODULE = {"residual_norm_modulate": "norm_modulate", "quantize": "gelu"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--image-tokens", type=int, default=4096, help="4096 is 1024 x 1024")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=24, help="of 128 numbers")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    layout = Layout(batch=1, text=options.text_tokens, image=options.image_tokens)
    # In turn, since one set alone would stay in the L2 cache.
    sets = [operations(layout, options.heads, device) for _ in range(SETS)]
    width = options.heads * 128
    source = torch.randn(layout.rows, 4 * width, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, options.seconds)
    ceiling = 2 * source.nbytes / seconds / 1e9
    print(f"copy {ceiling:.0f} GB/s")
    results: list[dict[str, Any]] = []
    engines = [kernels.PLAIN, kernels.triton_kernels()]
    if options.compile:
        engines.append(kernels.compiled_kernels())
    for name, (_, moved) in sets[0].items():
        calls = cycle([one[name][0] for one in sets])
        operation = name.split(" ")[0]
        module = MODULE.get(operation, operation)
        constant, values = TUNABLE[module]
        for engine in engines:
            triton = engine.name == "triton"
            for value in values if triton else (None,):
                where = import_module(f"krea_local.kernels.{module}") if triton else None
                with mock.patch.object(where, constant, value) if where else nullcontext():
                    seconds = timed(partial(next_call, calls, engine), device, options.seconds)
                rate = moved / seconds / 1e9
                results.append(
                    {
                        "operation": name,
                        "engine": engine.name,
                        "parameter": f"{constant}={value}" if triton else None,
                        "microseconds": seconds * 1e6,
                        "gb_per_second": rate,
                        "share_of_copy": rate / ceiling,
                    }
                )
                parameter = results[-1]["parameter"] or ""
                print(
                    f"{name:34} {engine.name:8} {parameter:22} {seconds * 1e6:10.1f} us "
                    f"{rate:7.0f} GB/s {rate / ceiling:6.0%}"
                )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    line = {"device": name, "copy_gb_per_second": ceiling, "operations": results}
    print(json.dumps(line | {"rows": layout.rows, "width": width, "versions": versions()}))
    return 0


def operations(
    layout: Layout, heads: int, device: torch.device
) -> dict[str, tuple[Callable[[Kernels], object], int]]:
    """Each operation as FLUX.1 calls it, and the bytes it has to move."""
    rows, width, text_rows = layout.rows, heads * 128, layout.text_rows

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, y, fused = draw(rows, width), draw(rows, width), draw(rows, 7 * width)
    gate, shift, scale = draw(2, 3, width).unbind(1)
    gate = gate / 1000  # x is added to again and again
    norms = tuple(draw(4, 128).unbind())
    angles = torch.randn(layout.text + layout.image, 64, device=device)
    cos, sin = angles.cos(), angles.sin()
    one, number = x.nbytes, 2
    found: dict[str, tuple[Callable[[Kernels], object], int]] = {
        "norm_modulate": (
            lambda ops: ops.norm_modulate(x, shift, scale, text_rows=text_rows),
            2 * one,
        ),
        "residual_norm_modulate": (
            lambda ops: ops.residual_norm_modulate(x, y, gate, shift, scale, text_rows=text_rows),
            4 * one,
        ),
        "qk_norm_rotary": (
            lambda ops: ops.qk_norm_rotary(
                fused[:, : 3 * width], norms[:2], norms[2:], cos, sin, layout=layout
            ),
            4 * one,
        ),
        "gelu": (lambda ops: ops.gelu(fused[:, 3 * width :], y), 10 * one),
    }
    random = torch.Generator(device).manual_seed(0)
    outputs = 16 if device.type == "cpu" else 4 * width  # the interpreter is slow
    columns = max(width, 256)  # of which a block of Q4_K is
    for kind in ("float8", "Q8_0", "Q4_K"):
        kept = random_model.packing(kind, (outputs, columns))
        parts = {name: random_model.random_part(kept, name, device, random) for name in kept.shapes}
        wide = draw(outputs, columns)
        moved = wide.nbytes + sum(part.nbytes for part in parts.values())
        found[f"widen {kind}"] = partial(_widen, kind=kind, parts=parts, out=wide), moved
    eight_bit = torch.float8_e4m3fn if device.type == "cpu" else eight_bit_of(device)
    if eight_bit is not None:
        found |= {
            "norm_modulate 8-bit": (
                lambda ops: _values(
                    ops.norm_modulate(x, shift, scale, text_rows=text_rows, eight_bit=eight_bit)
                ),
                one + one // number,
            ),
            "residual_norm_modulate 8-bit": (
                lambda ops: _values(
                    ops.residual_norm_modulate(
                        x, y, gate, shift, scale, text_rows=text_rows, eight_bit=eight_bit
                    )
                ),
                3 * one + one // number,
            ),
            "gelu 8-bit": (
                lambda ops: _values(ops.gelu(fused[:, 3 * width :], y, eight_bit=eight_bit)),
                5 * one + 5 * one // number,
            ),
            "quantize 8-bit": (
                lambda ops: _values(ops.quantize(x, eight_bit=eight_bit)),
                one + one // number,
            ),
        }
    return found


def _widen(ops: Kernels, *, kind: str, parts: dict[str, Tensor], out: Tensor) -> Tensor:
    return ops.widen(kind, parts, out)


def _values(rows: object) -> Tensor:
    assert isinstance(rows, Quantized)
    return rows.values


def next_call(calls: Iterator[Callable[[Kernels], object]], engine: Kernels) -> None:
    """One call over the next set of rows."""
    next(calls)(engine)


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds a call: the median of five stretches."""

    def stretch(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    stretch(2)  # compiles
    count = max(1, int(seconds / 5 / stretch(1)))
    return statistics.median(stretch(count) for _ in range(5))


if __name__ == "__main__":
    sys.exit(main())
