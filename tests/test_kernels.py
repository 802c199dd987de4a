"""The Triton kernels against plain torch: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.random_model import SCALES
from krea_local import kernels
from krea_local.kernels import PLAIN, Kernels, Layout, Quantized, Rows, ggml
from krea_local.kernels.rows import CODES, TABLE

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def fused() -> Kernels:
    return kernels.triton_kernels()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    seed = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=seed).to(DEVICE, dtype)


def assert_close(ours: Rows, wanted: Rows, dtype: torch.dtype) -> None:
    if isinstance(wanted, Quantized):
        assert isinstance(ours, Quantized)
        assert ours.values.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(ours.scale, wanted.scale, rtol=1e-4, atol=0)
        a, b = ours.values.float(), wanted.values.float()
        # The interpreter loses the carry where rounding up reaches the next power of two.
        carried = (a * 2 == b) & (b.abs().log2().frac() == 0)
        moved = (a != b) & ~(carried if DEVICE.type == "cpu" else torch.zeros_like(carried))
        # A number on the edge between two 8-bit floats may fall to either side.
        assert moved.sum() <= max(2, 0.03 * moved.numel())
        assert ((a - b).abs()[moved] <= b.abs()[moved] / 8 + 2**-9).all()
        return
    assert isinstance(ours, torch.Tensor)
    assert ours.dtype == wanted.dtype == dtype
    assert ours.shape == wanted.shape
    # Both round the same float32 result once: half a unit of bfloat16's last place, at most one.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    )
    torch.testing.assert_close(ours.float(), wanted.float(), **tolerance)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
QUANTIZED = pytest.mark.parametrize("quantized", [False, True])


@DTYPES
@QUANTIZED
@pytest.mark.parametrize(("rows", "width", "text_rows"), [(1, 16, 0), (7, 48, 3), (5, 384, 5)])
def test_norm_and_modulation(
    fused: Kernels, dtype: torch.dtype, quantized: bool, rows: int, width: int, text_rows: int
) -> None:
    x = draw(rows, width, dtype=dtype) + 3  # a mean that matters
    shift, scale = draw(2, 2, width, dtype=dtype).unbind(1)  # with strides, as in the tables
    results = [
        ops.norm_modulate(x, shift, scale, text_rows=text_rows, quantized=quantized)
        for ops in (fused, PLAIN)
    ]
    assert_close(results[0], results[1], dtype)


@DTYPES
@QUANTIZED
@pytest.mark.parametrize(("rows", "width", "text_rows"), [(1, 16, 1), (7, 48, 3), (5, 384, 0)])
def test_residual_norm_and_modulation_in_place(
    fused: Kernels, dtype: torch.dtype, quantized: bool, rows: int, width: int, text_rows: int
) -> None:
    y = draw(rows, 2 * width, dtype=dtype)[:, :width]  # rows with a stride
    vectors = draw(2, 3, width, dtype=dtype).unbind(1)
    results, streams = [], []
    for ops in (fused, PLAIN):
        x = draw(rows, width, dtype=dtype)
        results.append(
            ops.residual_norm_modulate(x, y, *vectors, text_rows=text_rows, quantized=quantized)
        )
        streams.append(x)
    assert_close(streams[0], streams[1], dtype)
    assert not torch.equal(streams[0], draw(rows, width, dtype=dtype))
    # One unit in the last place of the sum can become several of a small norm: compare that alone.
    assert_close(
        results[0],
        PLAIN.norm_modulate(streams[0], *vectors[1:], text_rows=text_rows, quantized=quantized),
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("text", "image"), [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 32), (24, 128)])
def test_query_and_key_norm_with_rotary_position(
    fused: Kernels, dtype: torch.dtype, batch: int, text: int, image: int, heads: int, dim: int
) -> None:
    layout = Layout(batch, text, image)
    qkv = draw(layout.rows, 7 * heads * dim, dtype=dtype)[:, : 3 * heads * dim]
    norms = draw(4, dim, dtype=dtype).unbind()
    angles = draw(text + image, dim // 2)
    results = [
        ops.qk_norm_rotary(
            qkv, tuple(norms[:2]), tuple(norms[2:]), angles.cos(), angles.sin(), layout=layout
        )
        for ops in (fused, PLAIN)
    ]
    for ours, wanted in zip(*results, strict=True):
        assert ours.shape == (batch, text + image, heads, dim)
        assert_close(ours, wanted, dtype)
    assert torch.equal(results[0][2], results[1][2])  # values only move


# The interpreter is numpy, which warns of the infinity within a sigmoid far below zero.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@DTYPES
@QUANTIZED
@pytest.mark.parametrize(("rows", "width", "before"), [(1, 16, 0), (7, 192, 48), (3, 33, 5)])
def test_gelu_that_joins(
    fused: Kernels, dtype: torch.dtype, quantized: bool, rows: int, width: int, before: int
) -> None:
    x = 3 * draw(rows, 2 * width, dtype=dtype)[:, width:]
    first = 9 * draw(rows, before, dtype=dtype) if before else None
    results = [ops.gelu(x, first, quantized=quantized) for ops in (fused, PLAIN)]
    assert_close(results[0], results[1], dtype)


@DTYPES
def test_quantisation_scales_each_row_and_survives_zeros(
    fused: Kernels, dtype: torch.dtype
) -> None:
    x = draw(5, 48, dtype=dtype) * torch.tensor(
        [[1e-3], [1.0], [1e3], [0.0], [30.0]], device=DEVICE
    )
    x = x.to(dtype)
    ours, wanted = fused.quantize(x), PLAIN.quantize(x)
    assert_close(ours, wanted, dtype)
    for found in (ours, wanted):
        assert found.values.float().abs().amax(dim=1)[[0, 1, 2, 4]].eq(448).all()
        assert torch.equal(kernels.dequantized(found)[3], torch.zeros(48, device=DEVICE))
        # CUTLASS reads the scales of a whole tile of rows.
        assert found.scale.untyped_storage().nbytes() >= 256 * 4


def test_emulated_and_true_numbers_of_a_quantised_matrix_agree() -> None:
    x = draw(64, 256)
    error = kernels.distance(PLAIN.quantize(x), x)
    assert 0.02 < error < 0.03  # 3 bits of fraction: 2^-4 at most, 2.6 % in the mean square


@DTYPES
def test_the_check_passes_what_is_right_and_refuses_what_is_not(
    fused: Kernels, dtype: torch.dtype
) -> None:
    arguments = {"heads": 3, "head_dim": 32, "quantized": False}
    kernels.check(fused, DEVICE, dtype, **arguments)
    wrong = Kernels(**{**vars(fused), "gelu": lambda x, *a, **k: PLAIN.gelu(x * 1.1, *a, **k)})
    with pytest.raises(ValueError, match="of triton differs by"):
        kernels.check(wrong, DEVICE, dtype, **arguments)
    nan = Kernels(**{**vars(fused), "gelu": lambda x, *a, **k: PLAIN.gelu(x * torch.nan, *a, **k)})
    with pytest.raises(ValueError, match="differs by nan"):
        kernels.check(nan, DEVICE, dtype, **arguments)
    with pytest.raises(ValueError, match="heads of 24 numbers"):
        kernels.check(fused, DEVICE, dtype, heads=2, head_dim=24, quantized=False)


def test_the_cpu_runs_plain_torch_without_excuse() -> None:
    cpu = torch.device("cpu")
    assert kernels.choose(cpu, torch.float32, heads=2, head_dim=16) == (PLAIN, None)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="here they run")
def test_where_kernels_fail_plain_torch_runs_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    chosen, notice = kernels.choose(torch.device("cuda"), torch.bfloat16, heads=2, head_dim=16)
    assert chosen is PLAIN
    assert notice is not None
    assert notice.startswith("plain torch operations run instead of Triton kernels, slower: ")
    assert "Triton kernels are not used" in caplog.text


def test_no_kernel_is_compiled_anew_for_another_number_of_rows() -> None:
    # Triton makes variants for integers that 16 divides; lengths must not, or what is checked at
    # load is not what runs. Strides, which follow from the width, may.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = """
from krea_local.kernels import gelu, norm_modulate, qk_norm_rotary, widen
for kernel in (gelu._kernel, norm_modulate._kernel, qk_norm_rotary._kernel, widen._kernel):
    lengths = [p for p in kernel.params if p.name in ("text_rows", "text_len", "image_len")]
    print(len(lengths), *(p.do_not_specialize for p in lengths))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines() == ["0", "1 True", "3 True True True", "0"]


def test_every_kernel_compiles_for_every_gpu_generation_without_spilling() -> None:
    # Triton lowers to machine code without a GPU, in a process where it does not interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    answer = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line.split() for line in answer.stdout.splitlines()]
    # Three kernels plain, two also with 8-bit floats; widening, of every kind.
    assert len(lines) == 3 * 3 + 2 * 2 + 3 * (len(ggml.KINDS) + 3)
    for name, capability, wide, local in lines:
        assert int(wide) >= 4, (name, capability)  # 16 bytes at once
        assert int(local) == 0, (name, capability)  # registers suffice


FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def packed(kind: str) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Parts of that kind, of all bit patterns that are numbers, and the shape they stand for."""
    seed = torch.Generator("cpu").manual_seed(0)
    size, nbytes = {"4bit": (64, 32)}.get(kind) or ggml.KINDS.get(kind, (1, 1))[:2]
    rows, blocks = 5, 61 if size == 1 else 7
    codes = torch.randint(0, 256, (rows, blocks, nbytes), dtype=torch.uint8, generator=seed)
    parts = {CODES: codes.flatten(1)}
    if kind in FLOATS:
        parts[CODES] = torch.where(codes & 127 < 124, codes, 0).flatten(1).view(FLOATS[kind])
        parts["scale"] = draw(rows)
    elif kind == "4bit":
        parts |= {"largest": draw(rows, blocks), TABLE: draw(16)}
    else:
        for start in SCALES[kind]:
            codes[:, :, start + 1] &= 0xBF  # below 2
    return {name: part.to(DEVICE) for name, part in parts.items()}, (rows, blocks * size)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "4bit", *ggml.KINDS])
def test_widening(fused: Kernels, kind: str) -> None:
    parts, shape = packed(kind)
    name = "float8" if kind in ("e4m3", "e5m2") else kind
    for dtype in (torch.float32, torch.bfloat16):
        ours, wanted = (
            ops.widen(name, parts, torch.full(shape, 7.0, dtype=dtype, device=DEVICE)).float()
            for ops in (fused, PLAIN)
        )
        assert wanted.std() > 0
        if dtype == torch.float32 or DEVICE.type == "cuda":
            assert torch.equal(ours, wanted)
        else:  # to which the interpreter rounds in a way of its own
            torch.testing.assert_close(ours, wanted, rtol=8e-3, atol=1e-6)


COMPILE = """
import re, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from krea_local.kernels import gelu, ggml, norm_modulate, qk_norm_rotary, widen
from krea_local.kernels.rows import EPS, FLOAT8_MAX, SMALLEST_SCALE

ENDS = dict(largest=FLOAT8_MAX, smallest_scale=SMALLEST_SCALE)
KERNELS = {
    "norm": (norm_modulate._kernel, 8,
             dict(width=3072, block=4096, residual=True, eps=EPS, **ENDS)),
    "gelu": (gelu._kernel, 16, dict(before_width=3072, width=12288, before_block=4096, block=16384,
                                    activate=True, **ENDS)),
    "qk": (qk_norm_rotary._kernel, 4, dict(heads=24, dim=128, block=8, copy_value=True, eps=EPS)),
}
SCALARS = {"text_rows", "text_len", "image_len"}
for capability in (80, 89, 90):
    for name, (kernel, warps, constants) in KERNELS.items():
        for quantized in ((False, True) if name != "qk" and capability > 80 else (False,)):
            values = dict(constants) if name == "qk" else dict(constants, quantized=quantized)
            signature = {}
            for argument in kernel.arg_names:
                if argument in values:
                    signature[argument] = "constexpr"
                elif argument in SCALARS or argument.endswith("stride"):
                    signature[argument] = "i32"
                elif argument in ("cos", "sin") or (quantized and argument == "out_scale"):
                    signature[argument] = "*fp32"
                else:
                    signature[argument] = "*fp8e4nv" if quantized and argument == "out" else "*bf16"
            aligned = {(i,): [["tt.divisibility", 16]]
                       for i, argument in enumerate(kernel.arg_names)
                       if argument not in values and argument not in SCALARS}
            source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                   options={"num_warps": warps})
            ptx = built.asm["ptx"]
            wide = len(re.findall(r"(?:ld|st)\\.global\\S*\\.v4\\.b32", ptx))
            local = len(re.findall(r"(?:ld|st)\\.local", ptx))
            print(name, capability, wide, local)
    kinds = [(kind, size, nbytes) for kind, (size, nbytes, _) in ggml.KINDS.items()]
    for kind, size, nbytes in [("e4m3", 3072, 0), ("e5m2", 3072, 0), ("4bit", 64, 0), *kinds]:
        values = dict(kind=kind, size=size, nbytes=nbytes, runs=widen.RUNS, run=widen.RUN)
        other = "*fp32" if nbytes == 0 else "*u8"
        signature = dict(codes="*u8", other=other, table="*fp32" if kind == "4bit" else "*u8",
                         out="*bf16")
        signature |= dict.fromkeys(values, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
        source = ASTSource(fn=widen._kernel, signature=signature, constexprs=values, attrs=aligned)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                               options={"num_warps": widen.WARPS, "enable_fp_fusion": False})
        ptx = built.asm["ptx"]
        assert not re.search(r"fma[.]rn", ptx), kind
        wide = 4 * len(re.findall(r"st\\.global\\S*\\.v4\\.b32", ptx))  # a store a thread
        print(kind, capability, wide, len(re.findall(r"(?:ld|st)\\.local", ptx)))
"""
