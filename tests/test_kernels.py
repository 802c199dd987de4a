"""The Triton kernels against plain torch: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.random_model import SCALES
from krea_local import kernels
from krea_local.kernels import PLAIN, Kernels, Layout, Quantized, Rows, fallback, ggml
from krea_local.kernels.rows import CODES, TABLE

pytest.importorskip("triton")
from krea_local.kernels import int8_product

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
        assert ours.values.dtype == wanted.values.dtype
        torch.testing.assert_close(ours.scale, wanted.scale, rtol=1e-4, atol=0)
        a, b = ours.values.float(), wanted.values.float()
        if wanted.values.dtype == torch.int8:
            # The kernel divides with an error of 2 units of the last place, and normalises with
            # one: a number between two integers may fall to either side.
            assert ((a - b).abs() <= 1).all()
            assert (a != b).sum() <= max(2, 0.005 * a.numel())
            return
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
FORMATS = [torch.float8_e4m3fn, torch.int8]
EIGHT_BIT = pytest.mark.parametrize("eight_bit", [None, *FORMATS])


@DTYPES
@EIGHT_BIT
@pytest.mark.parametrize(("rows", "width", "text_rows"), [(1, 16, 0), (7, 48, 3), (5, 384, 5)])
def test_norm_and_modulation(
    fused: Kernels, dtype: torch.dtype, eight_bit: Any, rows: int, width: int, text_rows: int
) -> None:
    x = draw(rows, width, dtype=dtype) + 3  # a mean that matters
    shift, scale = draw(2, 2, width, dtype=dtype).unbind(1)  # with strides, as in the tables
    results = [
        ops.norm_modulate(x, shift, scale, text_rows=text_rows, eight_bit=eight_bit)
        for ops in (fused, PLAIN)
    ]
    assert_close(results[0], results[1], dtype)


@DTYPES
@EIGHT_BIT
@pytest.mark.parametrize(("rows", "width", "text_rows"), [(1, 16, 1), (7, 48, 3), (5, 384, 0)])
def test_residual_norm_and_modulation_in_place(
    fused: Kernels, dtype: torch.dtype, eight_bit: Any, rows: int, width: int, text_rows: int
) -> None:
    y = draw(rows, 2 * width, dtype=dtype)[:, :width]  # rows with a stride
    vectors = draw(2, 3, width, dtype=dtype).unbind(1)
    results, streams = [], []
    for ops in (fused, PLAIN):
        x = draw(rows, width, dtype=dtype)
        results.append(
            ops.residual_norm_modulate(x, y, *vectors, text_rows=text_rows, eight_bit=eight_bit)
        )
        streams.append(x)
    assert_close(streams[0], streams[1], dtype)
    assert not torch.equal(streams[0], draw(rows, width, dtype=dtype))
    # One unit in the last place of the sum can become several of a small norm: compare that alone.
    assert_close(
        results[0],
        PLAIN.norm_modulate(streams[0], *vectors[1:], text_rows=text_rows, eight_bit=eight_bit),
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
@EIGHT_BIT
@pytest.mark.parametrize(("rows", "width", "before"), [(1, 16, 0), (7, 192, 48), (3, 33, 5)])
def test_gelu_that_joins(
    fused: Kernels, dtype: torch.dtype, eight_bit: Any, rows: int, width: int, before: int
) -> None:
    x = 3 * draw(rows, 2 * width, dtype=dtype)[:, width:]
    first = 9 * draw(rows, before, dtype=dtype) if before else None
    results = [ops.gelu(x, first, eight_bit=eight_bit) for ops in (fused, PLAIN)]
    assert_close(results[0], results[1], dtype)


@DTYPES
@pytest.mark.parametrize(("eight_bit", "largest"), [(FORMATS[0], 448), (FORMATS[1], 127)])
def test_quantisation_scales_each_row_and_survives_zeros(
    fused: Kernels, dtype: torch.dtype, eight_bit: torch.dtype, largest: int
) -> None:
    x = draw(5, 48, dtype=dtype) * torch.tensor(
        [[1e-3], [1.0], [1e3], [0.0], [30.0]], device=DEVICE
    )
    x = x.to(dtype)
    ours, wanted = (ops.quantize(x, eight_bit=eight_bit) for ops in (fused, PLAIN))
    assert_close(ours, wanted, dtype)
    for found in (ours, wanted):
        assert found.values.float().abs().amax(dim=1)[[0, 1, 2, 4]].eq(largest).all()
        assert torch.equal(kernels.dequantized(found)[3], torch.zeros(48, device=DEVICE))
        # CUTLASS reads the scales of a whole tile of rows.
        assert found.scale.untyped_storage().nbytes() >= 256 * 4


def test_emulated_and_true_numbers_of_a_quantised_matrix_agree() -> None:
    x = draw(64, 256)
    error = kernels.distance(PLAIN.quantize(x, eight_bit=torch.float8_e4m3fn), x)
    assert 0.02 < error < 0.03  # 3 bits of fraction: 2^-4 at most, 2.6 % in the mean square
    error = kernels.distance(PLAIN.quantize(x, eight_bit=torch.int8), x)
    assert 0.005 < error < 0.008  # the largest of 256 is 2.8: 0.29 of 2.8 / 127


def test_integers_are_rounded_to_the_nearest_and_halves_to_even(fused: Kernels) -> None:
    numbers = torch.tensor([[127.0, -127, 0.5, -0.5, 1.5, -1.5, 2.5, 125.5, 0.49, -126.51, 0, -1]])
    for ops in (fused, PLAIN):
        found = ops.quantize(numbers.to(DEVICE), eight_bit=torch.int8)
        assert found.scale.item() == 1
        assert found.values.tolist() == [[127, -127, 0, 0, 2, -2, 2, 126, 0, -127, 0, -1]]


def integers(*shape: int) -> torch.Tensor:
    random = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randint(-127, 128, shape, generator=random, dtype=torch.int8).to(DEVICE)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "inner", "outputs"),
    # One row, nothing that 16 divides, more than one tile either way, and its long axis twice.
    [(1, 16, 16), (7, 33, 5), (65, 96, 130), (3, 320, 48), (130, 64, 20)],
)
def test_a_product_of_integers(
    fused: Kernels, dtype: torch.dtype, rows: int, inner: int, outputs: int
) -> None:
    # Rows of a longer matrix, with a stride, and scales that begin within its own.
    x = Quantized(integers(rows + 3, inner + 7)[3:, :inner], draw(rows + 3, 1).abs()[3:])
    weight = Quantized(integers(outputs, inner), draw(outputs, 1).abs())
    bias = 100 * draw(outputs, dtype=dtype)
    exact = x.values.cpu().long() @ weight.values.cpu().long().t()
    wanted = exact.to(DEVICE).float() * x.scale * weight.scale.t() + bias.float()
    for ops in (fused, PLAIN):
        assert_close(ops.int8_product(x, weight, bias), wanted.to(dtype), dtype)
        # Some rows and columns of a larger matrix, and nothing beside them.
        out = torch.full((rows + 2, outputs + 3), 7.0, dtype=dtype, device=DEVICE)
        assert ops.int8_product(x, weight, bias, out=out[1:-1, 2:-1]) is not None
        assert_close(out[1:-1, 2:-1].contiguous(), wanted.to(dtype), dtype)
        out[1:-1, 2:-1] = 7
        assert out.eq(7).all()


def test_either_way_to_divide_a_product_of_integers_gives_the_same(
    fused: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = Quantized(integers(137, 80), draw(137, 1).abs())
    weight = Quantized(integers(264, 80), draw(264, 1).abs())
    small = fused.int8_product(x, weight, draw(264))
    assert int8_product.tile_of(137, 264) is int8_product.SMALL
    monkeypatch.setattr(int8_product, "FEW_TILES", 1)
    assert int8_product.tile_of(137, 264) is int8_product.LARGE
    assert torch.equal(small, fused.int8_product(x, weight, draw(264)))


def test_the_largest_sum_of_integers_is_exact(fused: Kernels) -> None:
    # 15360 is the longest row in FLUX.1; its sum has 28 bits.
    x = Quantized(torch.full((2, 15360), 127, dtype=torch.int8, device=DEVICE), torch.ones(2, 1))
    x.values[1, 15000:] = -126
    weight = Quantized(x.values[:1].expand(16, -1).contiguous(), torch.ones(16, 1))
    wanted = torch.tensor([127 * 127 * 15360, 127 * (127 * 15000 - 126 * 360)])
    x, weight = (Quantized(one.values, one.scale.to(DEVICE)) for one in (x, weight))
    for ops in (fused, PLAIN):
        found = ops.int8_product(x, weight, torch.zeros(16, device=DEVICE))
        assert torch.equal(found, wanted.float()[:, None].expand(2, 16).to(DEVICE))
    assert torch.equal(fallback._exact_product(x.values, weight.values)[:, 0].cpu(), wanted.int())


@DTYPES
def test_the_check_passes_what_is_right_and_refuses_what_is_not(
    fused: Kernels, dtype: torch.dtype
) -> None:
    arguments = {"heads": 3, "head_dim": 32, "eight_bit": None}
    kernels.check(fused, DEVICE, dtype, **arguments)
    whole = {**arguments, "eight_bit": torch.int8}  # of 8-bit floats the interpreter loses carries
    kernels.check(fused, DEVICE, dtype, **whole)
    coarse = Kernels(**{**vars(fused), "quantize": lambda x, **k: PLAIN.quantize(x * 1.1, **k)})
    with pytest.raises(ValueError, match="of triton differs by"):
        kernels.check(coarse, DEVICE, dtype, **whole)
    wrong = Kernels(**{**vars(fused), "gelu": lambda x, *a, **k: PLAIN.gelu(x * 1.1, *a, **k)})
    with pytest.raises(ValueError, match="of triton differs by"):
        kernels.check(wrong, DEVICE, dtype, **arguments)
    nan = Kernels(**{**vars(fused), "gelu": lambda x, *a, **k: PLAIN.gelu(x * torch.nan, *a, **k)})
    with pytest.raises(ValueError, match="differs by nan"):
        kernels.check(nan, DEVICE, dtype, **arguments)
    with pytest.raises(ValueError, match="heads of 24 numbers"):
        kernels.check(fused, DEVICE, dtype, heads=2, head_dim=24, eight_bit=None)


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
from krea_local.kernels import gelu, int8_product, norm_modulate, qk_norm_rotary, widen
LENGTHS = ("text_rows", "text_len", "image_len", "rows", "x_scale")
for module in (gelu, norm_modulate, qk_norm_rotary, int8_product, widen):
    kernel = module._kernel
    lengths = [p for p in kernel.params if p.name in LENGTHS]
    print(len(lengths), *(p.do_not_specialize for p in lengths))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    wanted = ["0", "1 True", "3 True True True", "2 True True", "0"]
    assert answer.stdout.splitlines() == wanted


def test_every_kernel_compiles_for_every_gpu_generation_without_spilling() -> None:
    # Triton lowers to machine code without a GPU, in a process where it does not interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    answer = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line.split() for line in answer.stdout.splitlines()]
    # Three kernels plain, two also with integers, and where there are such with 8-bit floats.
    fused = [line for line in lines if line[0] not in ("product", "widen")]
    assert len(fused) == 4 * (3 + 2) + 2 * 2
    assert len([line for line in lines if line[0] == "product"]) == 4 * 2
    assert len([line for line in lines if line[0] == "widen"]) == 4 * (len(ggml.KINDS) + 3)
    for name, capability, wide, spilled, shared, integers in lines:
        # 16 bytes at once; widening stores so, a number at a time being computed for it.
        assert int(wide) >= (1 if name == "widen" else 4), (name, capability)
        assert int(spilled) == 0, (name, capability)  # registers suffice
        assert int(shared) <= {"80": 163, "90": 227}.get(capability, 99) * 1024, (name, capability)
        assert (int(integers) > 0) == (name == "product"), (name, capability)


FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def packed(kind: str) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Parts of that kind, of all bit patterns that are numbers, and the shape they stand for."""
    seed = torch.Generator("cpu").manual_seed(0)
    size, nbytes = {"4bit": (64, 32)}.get(kind) or ggml.KINDS.get(kind, (1, 1))[:2]
    rows, blocks = 5, 48 if size == 1 else 7
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
import pathlib, re, subprocess, tempfile, warnings
warnings.simplefilter("ignore")
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import random_model
from krea_local.kernels.rows import CODES, TABLE
from krea_local.kernels import gelu, ggml, int8_product, norm_modulate, qk_norm_rotary, widen
from krea_local.kernels.rows import EPS, LARGEST, SMALLEST_SCALE

KERNELS = {
    "norm": (norm_modulate._kernel, 8, 3,
             dict(width=3072, block=4096, residual=True, eps=EPS, smallest_scale=SMALLEST_SCALE)),
    "gelu": (gelu._kernel, 16, 3,
             dict(before_width=3072, width=12288, before_block=4096, block=16384, activate=True,
                  smallest_scale=SMALLEST_SCALE)),
    "qk": (qk_norm_rotary._kernel, 4, 3,
           dict(heads=24, dim=128, block=8, copy_value=True, eps=EPS)),
}
PRODUCTS = [
    (int8_product._kernel, tile.warps, tile.stages,
     dict(tile_rows=tile.rows, tile_outputs=tile.outputs, tile_inner=tile.inner,
          group=int8_product.GROUP, whole=True))
    for tile in (int8_product.LARGE, int8_product.SMALL)
]
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LENGTHS = {"text_rows", "text_len", "image_len", "rows"}
SCALARS = LENGTHS | {"outputs", "inner"}
NAMES = {"float8_e4m3fn": "*fp8e4nv", "int8": "*i8"}
POINTERS = {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5", torch.uint8: "*u8",
            torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def example(kind):
    # A kind of weight, its parts and where it is widened to, as layers have them.
    shape = (64, 3072)
    out = torch.empty(shape, dtype=torch.bfloat16)
    if kind == "4bit":
        parts = {CODES: torch.empty(64, 1536, dtype=torch.uint8),
                 "largest": torch.empty(64, 48), TABLE: torch.empty(16)}
        return kind, parts, out
    name = "float8" if kind in ("e4m3", "e5m2") else kind
    kept = random_model.packing(name, shape)
    parts = {part: torch.empty(size, dtype=kept.dtypes[part]) for part, size in kept.shapes.items()}
    if kind == "e5m2":
        parts[CODES] = parts[CODES].view(torch.float8_e5m2)
    return name, parts, out


def build(name, capability, kernel, warps, stages, values, types, **options):
    signature = {}
    for argument in kernel.arg_names:
        if argument in values:
            signature[argument] = "constexpr"
        elif argument in SCALARS or argument.endswith("stride"):
            signature[argument] = "i32"
        else:
            signature[argument] = types.get(argument, "*bf16")
    aligned = {(i,): [["tt.divisibility", 16]]
               for i, argument in enumerate(kernel.arg_names)
               if argument not in values and not kernel.params[i].do_not_specialize}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                           options={"num_warps": warps, "num_stages": stages, **options})
    ptx = built.asm["ptx"]
    wide = len(re.findall(r"(?:ld|st)\\.global\\S*\\.v4\\.b32", ptx))
    integers = len(re.findall(r"mma\\S*\\.s32\\.s8\\.s8", ptx))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "-res-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    if "enable_fp_fusion" in options:
        assert not re.search(r"fma[.]rn[.]f32", ptx), name  # it would round once less
    local = re.search(r"STACK:(\\d+)", used).group(1)
    print(name, capability, wide, local, built.metadata.shared, integers)


for capability in (80, 86, 89, 90):
    for name, (kernel, warps, stages, values) in KERNELS.items():
        types = {"cos": "*fp32", "sin": "*fp32"}
        if name == "qk":
            build(name, capability, kernel, warps, stages, values, types)
            continue
        build(name, capability, kernel, warps, stages,
              dict(values, quantized=False, largest=0.0), types)
        for dtype, largest in LARGEST.items():
            kind = NAMES[str(dtype).removeprefix("torch.")]
            if kind == "*i8" or capability > 86:
                build(name, capability, kernel, warps, stages,
                      dict(values, quantized=True, largest=largest),
                      types | {"out": kind, "out_scale": "*fp32"})
    for product in PRODUCTS:
        build("product", capability, *product,
              {"x": "*i8", "weight": "*i8", "x_scale": "*fp32", "scale": "*fp32"})
    for kind in ("e4m3", "e5m2", "4bit", *ggml.KINDS):
        tensors, values = widen.arguments(*example(kind))
        names = {name: POINTERS[tensor.dtype]
                 for name, tensor in zip(widen._kernel.arg_names, tensors)}
        build("widen", capability, widen._kernel, widen.WARPS, 3, values, names,
              enable_fp_fusion=False)
"""
