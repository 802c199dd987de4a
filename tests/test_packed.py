"""Packed weights are the wide ones bit for bit, wherever they are, and take what is counted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from kept import (
    KEPT,
    Keeping,
    Tensors,
    as_comfy_quant,
    as_float8,
    as_is,
    as_nested_nf4,
    as_nf4,
    as_rows,
    as_scaled_fp8,
    write_gguf,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import krea_local
from benchmarks import random_model
from benchmarks.random_model import SCALES
from krea_local import InvalidRequest, KreaWarning, WeightsInvalid, loading, weights
from krea_local.engine import Engine
from krea_local.kernels import PLAIN, ggml
from krea_local.kernels.fallback import AT_ONCE
from krea_local.kernels.rows import CODES, TABLE
from krea_local.layers import EightBitLinear, Linear
from krea_local.packed import (
    PackedLinear,
    Packing,
    packed_layers,
    scratch_bytes,
    with_checked_widening,
)
from krea_local.pipeline import Krea
from krea_local.plan import Plan, options
from krea_local.tensor_names import pieces, to_diffusers

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
SIZE = {"width": 64, "height": 64}
FLOAT8 = [as_float8, as_scaled_fp8, as_comfy_quant, as_rows]


def write(keep: Keeping, file: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in keep(tensors)[0].items()}, file)
    return file


@pytest.fixture(scope="module")
def original(krea: Krea) -> Tensors:
    return {name: t.bfloat16() for name, t in krea.models.transformer.state_dict().items()}


@pytest.fixture(scope="module")
def files(original: Tensors, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer and T5 in files of 8 bits."""
    folder = tmp_path_factory.mktemp("files")
    write(as_scaled_fp8, folder / "flux.safetensors", original)
    t5 = load_file(tiny_folder / "text_encoder_2" / "model.safetensors")
    write(as_rows, folder / "t5.safetensors", t5)
    return folder


def load(tiny_folder: Path, file: Path | None, **options: object) -> Krea:
    common = {"device": "cpu", "dtype": "bfloat16", "progress": False, "transformer": file}
    return krea_local.load(tiny_folder, **{**common, **options})  # type: ignore[arg-type]


def picture(model: Krea, **arguments: object) -> bytes:
    given = {"image_size": SIZE, "num_inference_steps": 3, "seed": 1, **arguments}
    return model.txt2img("a fox", **given).images[0].tobytes()  # type: ignore[arg-type]


def packed_of(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {n: one for n, one in model.named_modules() if isinstance(one, PackedLinear)}


def native(krea: Krea) -> Engine:
    assert isinstance(krea.engine, Engine)
    return krea.engine


# --- numbers


@pytest.mark.parametrize("kind", sorted(ggml.KINDS))
def test_ggmls_blocks_are_the_numbers_of_its_own_package(kind: str) -> None:
    here = gguf.GGMLQuantizationType[kind]
    numbers, nbytes, _ = ggml.KINDS[kind]
    assert gguf.GGML_QUANT_SIZES[here] == (numbers, nbytes)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (40, 3 * nbytes), dtype=np.uint8)
    for start in SCALES[kind]:  # any bytes are numbers, but as scales they may be infinite
        for block in range(3):
            scales = random.normal(0, 0.01, 40).astype(np.float16)
            at = block * nbytes + start
            blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    wanted = gguf.dequantize(blocks, here)
    assert np.array_equal(ggml.widen(kind, torch.from_numpy(blocks)).numpy(), wanted)
    assert wanted.std() > 0


@pytest.mark.parametrize("kind", ["float8", "4bit", *ggml.KINDS])
def test_a_layer_is_widened_piece_by_piece_and_never_needs_more_than_is_counted(kind: str) -> None:
    rows, columns = AT_ONCE // 2048 + 3, 2048
    if kind == "4bit":
        packing = Packing(
            kind,
            {CODES: torch.uint8, "largest": torch.float32, TABLE: torch.float32},
            {CODES: (rows, columns // 2), "largest": (rows, columns // 64), TABLE: (16,)},
            (rows, columns),
        )
    else:
        packing = random_model.packing(kind, (rows, columns))
    layer = PackedLinear(packing, bias=False, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    for name, part in layer.parts.items():
        if kind != "4bit":
            part.copy_(random_model.random_part(packing, name, CPU, random))
        elif part.dtype == torch.uint8:
            part.random_(256, generator=random)
        else:
            part.normal_(generator=random)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = layer.wide()
    assert found.isfinite().all()
    assert found[-1].float().std() > 0
    some = torch.tensor([0, rows // 2, rows - 1])
    parts = {name: part if name == TABLE else part[some] for name, part in layer.parts.items()}
    alone = PLAIN.widen(kind, parts, torch.empty(len(some), columns, dtype=torch.bfloat16))
    assert torch.equal(alone, found[some])
    used = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    assert 2 * rows * columns < most <= scratch_bytes([layer], 2)


# --- files


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("keep", KEPT)
def test_what_a_file_keeps_in_fewer_bits_stays_so_and_stands_for_the_same(
    keep: Keeping, fused: bool, original: Tensors, tiny_folder: Path, tmp_path: Path, krea: Krea
) -> None:
    config = native(krea).transformer.config
    table = pieces(config.num_layers, config.num_single_layers)
    tensors = original if fused else to_diffusers(original, table, config.hidden_size)
    file = write(keep, tmp_path / "x.safetensors", tensors)
    wide = load(tiny_folder, file, packed=False)
    nothing = pytest.warns(KreaWarning, match="there is nothing to keep packed")
    with nothing if keep is as_is else nullcontext():
        packed = load(tiny_folder, file, packed=True)
    layers = packed_of(native(packed).transformer)
    assert not packed_of(native(wide).transformer)
    model = native(wide).transformer
    large = {id(owner.get_submodule(name)) for owner, name in model.large_layers()}
    names = {name for name, one in model.named_modules() if id(one) in large}
    assert (names <= layers.keys()) == (keep is not as_is)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            other = native(packed).transformer.get_submodule(name)
            assert isinstance(other, Linear)
            assert torch.equal(other.wide(), module.weight), name
            assert torch.equal(other.bias, module.bias), name
            assert (other.in_features, other.out_features) == module.weight.shape[::-1]
    assert picture(packed) == picture(wide)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_gguf_stays_as_it_is(
    kind: str, original: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "flux.gguf"
    wanted = write_gguf(file, "flux", original, gguf.GGMLQuantizationType[kind])
    packed = load(tiny_folder, file, packed=True)
    layers = packed_of(native(packed).transformer)
    assert {one.packing.kind for one in layers.values()} == {kind}
    for name, layer in layers.items():
        assert torch.equal(layer.wide(), wanted[f"{name}.weight"].bfloat16()), name
    assert picture(packed) == picture(load(tiny_folder, file, packed=False))


def test_layers_whose_parts_are_kept_in_different_ways_are_widened(
    original: Tensors, tiny_folder: Path, tmp_path: Path, krea: Krea
) -> None:
    config = native(krea).transformer.config
    table = pieces(config.num_layers, config.num_single_layers)
    parts = to_diffusers(original, table, config.hidden_size)
    stored, wanted = as_float8(parts)
    for name in stored:
        if name.endswith("attn.to_k.weight"):
            stored[name], wanted[name] = parts[name], parts[name].float()
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "x.safetensors")
    packed = load(tiny_folder, tmp_path / "x.safetensors", packed=True)
    layers = packed_of(native(packed).transformer)
    assert "double_blocks.0.img_attn.proj" in layers
    assert "double_blocks.0.img_attn.qkv" not in layers
    wide = load(tiny_folder, tmp_path / "x.safetensors", packed=False)
    assert picture(packed) == picture(wide)


@pytest.mark.parametrize("keep", [as_float8, as_scaled_fp8, as_rows, as_nested_nf4])
def test_t5_stays_as_it_is(keep: Keeping, tiny_folder: Path, tmp_path: Path) -> None:
    t5 = load_file(tiny_folder / "text_encoder_2" / "model.safetensors")
    file = write(keep, tmp_path / "t5.safetensors", t5)
    packed, wide = (
        load(tiny_folder, None, text_encoder_2=file, packed=packed) for packed in (True, False)
    )
    layers = packed_of(packed.models.text_encoder_2)
    # Rows of most are shorter than nf4's blocks here, which then are not of one row.
    assert len(layers) == (2 if keep is as_nested_nf4 else 2 * 7)
    states = wide.models.text_encoder_2.state_dict()
    for name, layer in layers.items():
        assert torch.equal(layer.wide(), states[f"{name}.weight"]), name
    for one, other in zip(packed.encode_prompt("a fox"), wide.encode_prompt("a fox"), strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


# --- levels


@pytest.mark.parametrize("keep", FLOAT8)
def test_8_bit_floats_go_to_products_in_8_bits_as_they_are_in_the_same_memory(
    keep: Keeping, original: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write(keep, tmp_path / "x.safetensors", original)
    packed = native(load(tiny_folder, file, packed=True)).transformer
    wide = native(load(tiny_folder, file, packed=False)).transformer
    assert packed.is_kept_in_float8
    assert not wide.is_kept_in_float8
    ours, theirs = (one.in_eight_bit(E4M3, PLAIN, CPU) for one in (packed, wide))
    homes = {layer.parts[CODES].data_ptr() for layer in packed_of(packed).values()}
    for (owner, name), (other, _) in zip(ours.large_layers(), theirs.large_layers(), strict=True):
        one, two = owner.get_submodule(name), other.get_submodule(name)
        assert isinstance(one, EightBitLinear)
        assert isinstance(two, EightBitLinear)
        assert one.weight.data_ptr() in homes
        # Dividing by scales that are not powers of two, wide ones come back as they were.
        assert torch.equal(one.weight.float() * one.scale.T, two.weight.float() * two.scale.T)


def test_streamed_at_both_precisions_packed_blocks_have_one_home(
    files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krea_local import speed

    monkeypatch.setattr(speed, "eight_bit_of", lambda device: E4M3)
    for packed in (True, False):
        krea = load(tiny_folder, files / "flux.safetensors", packed=packed, offload="blocks")
        assert picture(krea, acceleration="regular") != picture(krea)
        streams = [
            native(krea)._stream(model)
            for model in (native(krea).transformer, native(krea)._eight_bit)
            if model is not None
        ]
        homes = [[home.data_ptr() for home in stream.homes] for stream in streams]
        assert len(homes) == 2
        assert (homes[0] == homes[1]) == packed


def test_a_lora_is_added_to_packed_weights_and_leaves_no_trace(
    files: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    packed, wide = (
        load(tiny_folder, files / "flux.safetensors", packed=packed) for packed in (True, False)
    )
    layer = native(wide).transformer.get_submodule("single_blocks.0.linear2")
    assert isinstance(layer, Linear)
    torch.manual_seed(0)
    save_file(
        {
            "single_blocks.0.linear2.lora_A.weight": torch.randn(4, layer.in_features),
            "single_blocks.0.linear2.lora_B.weight": torch.randn(layer.out_features, 4),
        },
        tmp_path / "lora.safetensors",
    )
    before = picture(packed)
    loras = [{"path": str(tmp_path / "lora.safetensors"), "scale": 0.5}]
    with_lora = picture(packed, loras=loras)
    assert with_lora == picture(wide, loras=loras) != before
    assert picture(packed) == before


# --- memory


def test_whatever_the_plan_the_picture_is_that_of_wide_weights(
    files: Path, tiny_folder: Path
) -> None:
    both = {"transformer": files / "flux.safetensors", "text_encoder_2": files / "t5.safetensors"}
    wanted = picture(load(tiny_folder, None, packed=False, **both))
    checkpoint = weights.find(tiny_folder, **both)
    wide, narrow = (loading.sizes(checkpoint, torch.bfloat16, packed=one) for one in (False, True))
    seen = set()
    for packed, sizes in ((None, wide), (None, narrow), (True, narrow)):
        for plan in options(Plan(sizes, packed=sizes is narrow)):
            if plan.strips:
                continue
            made = load(tiny_folder, None, memory=f"{plan.peak}B", packed=packed, **both)
            assert made.plan is not None
            assert made.plan.peak <= plan.peak
            assert bool(packed_of(native(made).transformer)) == made.plan.packed
            seen.add((packed, made.plan.packed, made.plan.offload))
            assert picture(made) == wanted
    # Of themselves they are packed only where wide blocks would have to visit.
    assert {(None, False, "none"), (None, False, "blocks"), (None, True, "blocks")} <= seen
    assert {(True, True, "none"), (True, True, "modulation"), (True, True, "blocks")} <= seen


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_sizes_of_packed_weights_are_those_that_are_loaded(
    part: str, files: Path, tiny_folder: Path
) -> None:
    file = files / ("flux.safetensors" if part == "transformer" else "t5.safetensors")
    found = loading.sizes(weights.find(tiny_folder, **{part: file}), torch.bfloat16, packed=True)
    made = load(tiny_folder, None, packed=True, **{part: file})
    transformer, t5 = native(made).transformer, made.models.text_encoder_2

    def total(*modules: torch.nn.Module) -> int:
        return sum({id(p): p.nbytes for one in modules for p in one.parameters()}.values())

    assert found.blocks == tuple(total(*block) for block in transformer.step_blocks())
    assert found.modulation == total(*transformer.modulations())
    assert found.t5_blocks == tuple(total(block) for block in t5.encoder.block)
    assert found.t5 == total(t5)
    assert found.eight_bit == (part == "transformer")
    assert found.scratch > 0
    wide = loading.sizes(weights.find(tiny_folder), torch.bfloat16)
    assert found.numbers == wide.numbers
    assert sum(wide.blocks) == 2 * sum(wide.numbers)
    assert wide.scratch == 0
    assert not wide.eight_bit


@pytest.mark.parametrize("offload", ["modulation", "model", "blocks"])
def test_offloaded_packed_weights_are_all_there_when_they_are_needed(
    offload: str, files: Path, tiny_folder: Path
) -> None:
    # The meta device stands in for a GPU: a tensor left behind on the CPU would be an error.
    both = {"transformer": files / "flux.safetensors", "text_encoder_2": files / "t5.safetensors"}
    made = load(tiny_folder, None, offload=offload, packed=True, **both)
    engine, placing, meta = native(made), made._placing, torch.device("meta")
    made.device = engine.device = placing.device = meta
    for stream in (*engine._streams.values(), *filter(None, [placing._t5])):
        stream.device = meta
    if offload == "modulation":  # all else is there
        for module in engine.transformer.step_modules():
            module.to(meta)
        made.models.text_encoder.to(meta)
        made.models.text_encoder_2.to(meta)
    request = made._with_own_defaults(krea_local.Txt2ImgRequest(prompt="a fox"))
    assert made.encode_prompt("a fox")[0].device == meta
    assert made.latents(request, seeds=[1], width=64, height=64).device == meta
    assert {
        p.device.type for layer in engine.transformer.modulations() for p in layer.parameters()
    } == {"cpu"}


def test_nothing_is_packed_without_being_asked_where_there_is_no_plan(
    files: Path, tiny_folder: Path
) -> None:
    made = load(tiny_folder, files / "flux.safetensors")
    assert not packed_of(native(made).transformer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packed": "yes"}, "packed='yes': should be True, False or None"),
        ({"packed": True, "engine": "diffusers"}, "packed=True: is for engine='native'"),
    ],
)
def test_what_cannot_be_packed_is_told(options: dict[str, object], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        krea_local.load("tiny", progress=False, **options)  # type: ignore[arg-type]


def test_packings_join_only_where_rows_can_be_stacked() -> None:
    one = Packing("float8", {CODES: torch.float8_e4m3fn}, {CODES: (4, 8)}, (4, 8))
    assert one.joins(one.of_rows(9))
    assert one.of_rows(9).shapes == {CODES: (9, 8)}
    assert not one.joins(replace(one, kind="Q8_0"))
    assert not one.joins(replace(one, dtypes={CODES: torch.float8_e5m2}))
    assert not one.joins(replace(one, shapes={CODES: (4, 9)}))


def test_widening_reads_pairs_from_the_upper_half() -> None:
    parts = {
        CODES: torch.tensor([[0x12, 0xF0]], dtype=torch.uint8),
        "largest": torch.tensor([[2.0, 10.0]]),
        "table": torch.arange(16.0),
    }
    assert PLAIN.widen("4bit", parts, torch.empty(1, 4)).tolist() == [[2.0, 4.0, 150.0, 0.0]]


@pytest.mark.parametrize("fault", ["other", "fails"])
def test_a_kernel_that_widens_wrongly_is_not_used(
    fault: str, files: Path, tiny_folder: Path
) -> None:
    def widen(kind: str, parts: Tensors, out: Tensor) -> Tensor:
        if fault == "fails":
            raise RuntimeError("no such instruction")
        return PLAIN.widen(kind, parts, out).mul_(1.01)

    model = native(load(tiny_folder, files / "flux.safetensors", packed=True)).transformer
    layers = packed_layers(model)
    right = replace(PLAIN, name="triton", widen=lambda *given: PLAIN.widen(*given))
    assert with_checked_widening(right, layers, CPU) == (right, None)
    kernels, notice = with_checked_widening(replace(PLAIN, widen=widen), layers, CPU)
    assert kernels.widen is PLAIN.widen
    assert notice is not None
    assert "slower than by Triton" in notice
    assert ("no such instruction" if fault == "fails" else "of kind float8") in notice
    model.use(right)
    assert {
        layer.kernels.name for layer in packed_layers(model.in_eight_bit(E4M3, PLAIN, CPU))
    } == {"triton"}


def test_in_int8_packed_weights_are_rounded_as_wide_ones_are(
    files: Path, tiny_folder: Path
) -> None:
    packed, wide = (
        native(load(tiny_folder, files / "flux.safetensors", packed=packed)).transformer
        for packed in (True, False)
    )
    ours, theirs = (one.in_eight_bit(torch.int8, PLAIN, CPU) for one in (packed, wide))
    for (owner, name), (other, _) in zip(ours.large_layers(), theirs.large_layers(), strict=True):
        one, two = owner.get_submodule(name), other.get_submodule(name)
        assert isinstance(one, EightBitLinear)
        assert isinstance(two, EightBitLinear)
        assert one.weight.dtype == torch.int8
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.scale, two.scale)


def test_fused_parts_with_different_tables_of_4_bits_are_widened(
    original: Tensors, tiny_folder: Path, tmp_path: Path, krea: Krea
) -> None:
    config = native(krea).transformer.config
    table = pieces(config.num_layers, config.num_single_layers)
    stored, _ = as_nf4(to_diffusers(original, table, config.hidden_size))
    for name in stored:
        if name.endswith("attn.to_k.weight.quant_map"):
            stored[name] = stored[name].flip(0).contiguous()
    file = tmp_path / "x.safetensors"
    save_file({n: t.contiguous() for n, t in stored.items()}, file)
    packed, wide = (load(tiny_folder, file, packed=packed) for packed in (True, False))
    layers = packed_of(native(packed).transformer)
    assert "double_blocks.0.img_attn.proj" in layers
    assert "double_blocks.0.img_attn.qkv" not in layers
    for name, module in native(wide).transformer.named_modules():
        if isinstance(module, Linear):
            other = native(packed).transformer.get_submodule(name)
            assert isinstance(other, Linear)
            assert torch.equal(other.wide(), module.weight), name


def test_each_layer_is_widened_once_a_prompt_and_once_a_step(
    files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(
        tiny_folder,
        files / "flux.safetensors",
        text_encoder_2=files / "t5.safetensors",
        packed=True,
    )
    widened: dict[int, int] = {}
    weight_on = PackedLinear.weight_on

    def count(self: PackedLinear, device: torch.device) -> Tensor:
        widened[id(self)] = widened.get(id(self), 0) + 1
        return weight_on(self, device)

    monkeypatch.setattr(PackedLinear, "weight_on", count)
    model.encode_prompt("a fox")
    t5 = packed_layers(model.models.text_encoder_2)
    assert widened == {id(layer): 1 for layer in t5}
    widened.clear()
    picture(model, num_inference_steps=3)
    transformer = native(model).transformer
    packed = {id(layer) for layer in packed_layers(transformer)}
    modulation = {id(layer): 1 for layer in transformer.modulations() if id(layer) in packed}
    steps = dict.fromkeys(packed - modulation.keys(), 3)
    assert {key: n for key, n in widened.items() if key not in modulation} == steps
    assert {key: n for key, n in widened.items() if key in modulation} == modulation


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "quant_map"])
@pytest.mark.parametrize("packed", [True, False])
def test_parts_of_4_bits_that_are_too_short_are_named(
    part: str, packed: bool, original: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    stored, _ = as_nested_nf4(original)
    name = f"single_blocks.0.linear2.weight.{part}"
    stored[name] = stored[name][:-1].clone()
    file = tmp_path / "x.safetensors"
    save_file({n: t.contiguous() for n, t in stored.items()}, file)
    with pytest.raises(WeightsInvalid, match=rf"{part} has [\d,]+ numbers where [\d,]+ belong"):
        load(tiny_folder, file, packed=packed)


def test_gguf_shapes_that_are_not_those_of_its_blocks_are_refused(
    original: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    name = "single_blocks.0.linear2.weight"
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    for other, tensor in original.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if other == name else gguf.GGMLQuantizationType.F32
        numbers = tensor.float().numpy()
        numbers = numbers[: len(numbers) // 2] if other == name else numbers
        writer.add_tensor(other, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(original[name].shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for packed in (True, False):
        with pytest.raises(WeightsInvalid, match=name):
            load(tiny_folder, tmp_path / "x.gguf", packed=packed)
