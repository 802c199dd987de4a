from __future__ import annotations

import pickle
import shutil
import sys
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
    as_nf4,
    as_rows,
    as_scaled_fp8,
    write_gguf,
)
from safetensors.torch import load_file, save_file

import krea_local
from benchmarks.random_model import SCALES
from krea_local import (
    InvalidRequest,
    KreaError,
    UnsupportedModel,
    WeightsInvalid,
    WeightsNotFound,
    formats,
    reading,
    weights,
)
from krea_local.kernels import PLAIN, ggml
from krea_local.kernels.rows import CODES
from krea_local.packed import PackedLinear
from krea_local.pipeline import Krea
from krea_local.tensor_names import pieces, to_diffusers, to_original

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(krea: Krea) -> Tensors:
    """The tiny transformer's tensors under their original names, in bfloat16 as published."""
    return {name: t.bfloat16() for name, t in krea.models.transformer.state_dict().items()}


@pytest.fixture(scope="module")
def t5(tiny_folder: Path) -> Tensors:
    return load_file(tiny_folder / "text_encoder_2" / "model.safetensors")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without weights of transformer and T5."""
    made = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    for part in ("transformer", "text_encoder_2"):
        for file in (made / part).glob("*.safetensors"):
            file.unlink()
    return made


def load(folder: Path, tiny: Path, **files: Path) -> Krea:
    """With what `files` do not hold from the tiny checkpoint."""
    for part in {"transformer", "text_encoder_2"} - set(files):
        for file in (tiny / part).glob("*.safetensors"):
            shutil.copy(file, folder / part)
    return krea_local.load(folder, device="cpu", dtype="float32", progress=False, **files)


def transformer_of(krea: Krea) -> Tensors:
    return dict(krea.models.transformer.state_dict())


def t5_of(krea: Krea) -> Tensors:
    return dict(krea.models.text_encoder_2.state_dict())


def assert_equal(loaded: Tensors, wanted: Tensors) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("keep", KEPT)
def test_a_transformer_in_its_original_layout(
    keep: Keeping, prefix: str, original: Tensors, folder: Path, tiny_folder: Path
) -> None:
    stored, wanted = keep(original)
    stored = {f"{prefix}{name}": tensor for name, tensor in stored.items()}
    if prefix:  # beside it, the other models of a file that holds all
        stored["vae.decoder.conv_in.weight"] = torch.ones(3)
        stored["text_encoders.clip_l.transformer.text_model.a.weight"] = torch.ones(3)
    file = folder.parent / "flux1-krea-dev.safetensors"
    save_file(stored, file)
    krea = load(folder, tiny_folder, transformer=file)
    assert_equal(transformer_of(krea), wanted)
    assert krea.label == "flux1-krea-dev"


@pytest.mark.parametrize("keep", KEPT)
def test_a_transformer_in_diffusers_layout(
    keep: Keeping, folder: Path, tiny_folder: Path, krea: Krea
) -> None:
    stored, wanted = keep(load_file(tiny_folder / TRANSFORMER))
    save_file(stored, folder / TRANSFORMER)
    for part in ("text_encoder_2",):
        shutil.copy(tiny_folder / part / "model.safetensors", folder / part)
    config = krea.models.transformer.config
    table = pieces(config.num_layers, config.num_single_layers)
    loaded = krea_local.load(folder, device="cpu", dtype="float32", progress=False)
    assert_equal(transformer_of(loaded), to_original(wanted, table, config.hidden_size))


@pytest.mark.parametrize("keep", [as_float8, as_scaled_fp8, as_comfy_quant, as_rows])
@pytest.mark.parametrize("fused", [True, False])
def test_levels_in_8_bits_take_a_files_own_8_bit_floats(
    fused: bool, keep: Keeping, original: Tensors, folder: Path, tiny_folder: Path, krea: Krea
) -> None:
    config = krea.engine.transformer.config  # type: ignore[union-attr]
    table = pieces(config.num_layers, config.num_single_layers)
    width = config.hidden_size
    tensors = original if fused else to_diffusers(original, table, width)
    stored, wanted = keep(tensors)
    file = folder / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file)
    files = {"device": "cpu", "dtype": "bfloat16", "progress": False, "transformer": file}
    model = krea_local.load(tiny_folder, **files).engine.transformer
    half = model.in_eight_bit(torch.float8_e4m3fn, PLAIN, torch.device("cpu"))
    wanted = wanted if fused else to_original(wanted, table, width)
    seen = 0
    for owner, name in half.large_layers():
        layer = owner.get_submodule(name)
        path = next(path for path, module in half.named_modules() if module is layer)
        found = layer.weight.float() * layer.scale.reshape(-1, 1)
        exact = wanted[f"{path}.weight"].float()
        assert torch.equal(found, exact), path  # in bfloat16 they were rounded, and are not now
        seen += 1
    assert seen > 4
    # Integers are made of the floats, whatever scales those have.
    integers = model.in_eight_bit(torch.int8, PLAIN, torch.device("cpu"))
    for (owner, name), (other, _) in zip(
        integers.large_layers(), model.large_layers(), strict=True
    ):
        layer, source = owner.get_submodule(name), other.get_submodule(name)
        made = PLAIN.quantize(source.weight, eight_bit=torch.int8)
        assert torch.equal(layer.weight, made.values)
        assert torch.equal(layer.scale.t(), made.scale)


@pytest.mark.parametrize("keep", [as_is, as_float8, as_scaled_fp8, as_rows])
def test_t5_from_a_single_file(keep: Keeping, t5: Tensors, folder: Path, tiny_folder: Path) -> None:
    stored, wanted = keep(t5)
    file = folder.parent / "t5xxl.safetensors"
    save_file(stored, file)
    assert_equal(t5_of(load(folder, tiny_folder, text_encoder_2=file)), wanted)


def test_both_engines_draw_the_same_picture_from_a_single_file(
    original: Tensors, folder: Path, tiny_folder: Path, krea: Krea, krea_diffusers: Krea
) -> None:
    file = folder.parent / "flux1-krea-dev.safetensors"
    save_file(original, file)

    def picture(model: Krea) -> bytes:
        size = {"width": 64, "height": 64}
        result = model.txt2img("a fox", image_size=size, num_inference_steps=2, seed=1)
        return result.images[0].tobytes()

    assert picture(load(folder, tiny_folder, transformer=file)) == picture(krea)
    theirs = krea_local.load(
        folder, transformer=file, device="cpu", engine="diffusers", progress=False
    )
    assert picture(theirs) == picture(krea_diffusers)


# --- GGUF


SIMPLE_KINDS = ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"]


@pytest.mark.parametrize("kind", SIMPLE_KINDS)
def test_a_transformer_in_gguf(
    kind: str, original: Tensors, folder: Path, tiny_folder: Path
) -> None:
    file = folder.parent / f"flux1-krea-dev-{kind}.gguf"
    wanted = write_gguf(file, "flux", original, gguf.GGMLQuantizationType[kind])
    krea = load(folder, tiny_folder, transformer=file)
    assert_equal(transformer_of(krea), wanted)
    name = "double_blocks.0.img_attn.qkv.weight"
    error = (transformer_of(krea)[name] - original[name].float()).norm()
    assert error / original[name].float().norm() < (0.2 if kind.startswith("Q4") else 0.1)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_t5_in_gguf_under_llama_cpps_names(
    kind: str, t5: Tensors, folder: Path, tiny_folder: Path
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)

    def name_of(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found, name
        return found

    file = folder.parent / "t5-encoder.gguf"
    wanted = write_gguf(file, "t5encoder", t5, gguf.GGMLQuantizationType[kind], name_of)
    assert_equal(t5_of(load(folder, tiny_folder, text_encoder_2=file)), wanted)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL"])
def test_blocks_at_the_true_width_are_the_numbers_that_diffusers_reads(
    kind: str, tmp_path: Path
) -> None:
    """Another implementation of the same blocks."""
    from diffusers.quantizers.gguf.utils import dequantize_functions

    here = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[here]
    random = np.random.default_rng(0)
    rows, columns = 64, 3072
    blocks = random.integers(0, 256, (rows * columns // block, nbytes), dtype=np.uint8)
    for start in {**SCALES, "IQ4_NL": (0,)}[
        kind
    ]:  # any bytes are numbers, but as scales they may be infinite
        scales = random.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales[:, None].view(np.uint8)
    data = blocks.reshape(rows, -1)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "flux")
    writer.add_tensor("img_in.weight", data, raw_dtype=here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with formats.opened([tmp_path / "blocks.gguf"]) as stored:
        (one,) = stored.values()
        assert (one.name, one.shape, one.kind) == ("img_in.weight", (rows, columns), kind)
        ours = one.read()
        packed = one.packed
    if kind in ggml.KINDS:
        assert packed is not None
        layer = PackedLinear(packed.packing, bias=False, dtype=torch.bfloat16)
        reading.read([reading.Transfer(packed.codes, layer.parts[CODES], "")], lambda *_: None)
        assert torch.equal(layer.wide(), ours.bfloat16())
    else:
        assert packed is None
    theirs = dequantize_functions[here](torch.from_numpy(blocks), block, nbytes)
    assert ours.isfinite().all()
    assert ours.std() > 0
    # Theirs multiplies half-precision scales as such here and there.
    torch.testing.assert_close(ours, theirs.reshape(rows, columns).float(), rtol=2e-3, atol=2e-3)


def test_a_scaled_tensor_at_the_true_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"double_blocks.0.img_attn.proj.weight": torch.randn(3072, 3072) * 0.02}
    for keep, most in ((as_scaled_fp8, 0.03), (as_rows, 0.03), (as_nf4, 0.1), (as_float8, 0.06)):
        stored, wanted = keep(tensors)
        save_file(stored, tmp_path / "a.safetensors")
        with formats.opened([tmp_path / "a.safetensors"]) as found:
            ours = found["double_blocks.0.img_attn.proj.weight"].read()
            packed = found["double_blocks.0.img_attn.proj.weight"].packed
            assert packed is not None
            layer = PackedLinear(packed.packing, bias=False, dtype=torch.float32)
            reading.read([reading.Transfer(packed.codes, layer.parts[CODES], "")], lambda *_: None)
            for name, other in packed.others().items():
                layer.parts[name].copy_(other)
        assert torch.equal(layer.wide(), ours)
        assert_equal({"a": ours}, {"a": next(iter(wanted.values()))})
        (tensor,) = tensors.values()
        assert float((ours - tensor).norm() / tensor.norm()) < most


# --- where the rest comes from


def test_a_file_beside_a_checkpoint_takes_the_rest_from_there(
    original: Tensors, folder: Path, tiny_folder: Path, krea: Krea
) -> None:
    shutil.copy(tiny_folder / "text_encoder_2" / "model.safetensors", folder / "text_encoder_2")
    file = folder / "flux1-dev.safetensors"  # as in the published repositories
    save_file(original, file)
    found = weights.find(file)
    assert (found.folder, found.transformer_file) == (folder, file)
    assert found.family is weights.DEV
    loaded = krea_local.load(file, device="cpu", progress=False)
    assert_equal(transformer_of(loaded), transformer_of(krea))


def test_a_file_elsewhere_takes_the_rest_from_the_default(
    original: Tensors, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "elsewhere" / "model.safetensors"
    file.parent.mkdir()
    save_file(original, file)
    with pytest.raises(WeightsNotFound, match=r"is a transformer; of the rest: .* 33\.7 GB"):
        weights.find(file)
    monkeypatch.setenv("KREA_LOCAL_MODEL", str(folder))
    found = weights.find(file)
    assert (found.folder, found.transformer_file, found.label) == (folder, file, "model")
    assert found.family is weights.KREA
    monkeypatch.delenv("KREA_LOCAL_MODEL")
    assert weights.find(folder, transformer=file) == found


def test_of_parts_that_come_from_files_only_the_configuration_is_fetched(
    original: Tensors, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, patterns: list[str], **_: object) -> Path:
        asked.append(patterns)
        return folder

    monkeypatch.setattr(weights, "snapshot", snapshot)
    files = {}
    for part in ("transformer", "text_encoder_2"):
        files[part] = tmp_path / f"{part}.safetensors"
        files[part].write_bytes(b"")
    weights.find("krea", transformer=files["transformer"])
    weights.find("krea", **files)
    for patterns, parts in zip(asked, (["transformer"], list(files)), strict=True):
        for part in parts:
            assert f"{part}/*" not in patterns
            assert f"{part}/config.json" in patterns
        assert "vae/*" in patterns
    assert "text_encoder_2/*" in asked[0]


# --- what is refused


def refused(tensors: Tensors, tmp_path: Path, match: str) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    with (
        pytest.raises(WeightsInvalid, match=match),
        formats.opened([tmp_path / "bad.safetensors"]) as found,
    ):
        [one.read() for one in found.values()]


def test_numbers_that_would_be_misread_are_refused(original: Tensors, tmp_path: Path) -> None:
    name = "single_blocks.0.linear1"
    stored, _ = as_scaled_fp8(original)
    lacking = {key: value for key, value in stored.items() if key != f"{name}.scale_weight"}
    refused(lacking, tmp_path, rf"{name}.weight is F8_E4M3 without the scale")
    blocks = stored | {f"{name}.scale_weight": torch.ones(2, 3)}
    refused(blocks, tmp_path, r"scale_weight is \(2, 3\): scales by block")
    integers = original | {f"{name}.weight": torch.ones(4, 4, dtype=torch.int8)}
    refused(integers, tmp_path, rf"{name}.weight is I8: such weights are not read")
    stored, _ = as_comfy_quant(original)
    for text, match in ((b'{"format": "nvfp4"}', "nvfp4"), (b"[]", "JSON object"), (b"{", "JSON")):
        says = torch.tensor(list(text), dtype=torch.uint8)
        refused(stored | {f"{name}.comfy_quant": says}, tmp_path, match)
    stored, _ = as_nf4(original)
    says = torch.tensor(list(b'{"shape": [2, 2]}'), dtype=torch.uint8)
    state = f"{name}.weight.quant_state.bitsandbytes__nf4"
    refused(stored | {state: says}, tmp_path, "lacks 'blocksize'")


def test_a_tensor_too_many_or_too_few_is_named(
    original: Tensors, folder: Path, tiny_folder: Path
) -> None:
    file = folder.parent / "flux1-krea-dev.safetensors"
    name = "single_blocks.0.linear2.bias"
    for tensors, match in (
        (original | {"single_blocks.0.linear3.bias": torch.ones(3)}, "linear3.bias is not part"),
        ({key: value for key, value in original.items() if key != name}, f"{name} is missing"),
        (original | {name: torch.ones(3)}, rf"{name} is \(3,\) where config.json says \(64,\)"),
        ({"guess": torch.ones(3)}, "is missing"),
    ):
        save_file(tensors, file)
        with pytest.raises(WeightsInvalid, match=match):
            load(folder, tiny_folder, transformer=file)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_gguf_is_named(
    keep: int, original: Tensors, folder: Path, tiny_folder: Path
) -> None:
    file = folder.parent / "flux1.gguf"
    write_gguf(file, "flux", original, gguf.GGMLQuantizationType.Q8_0)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsInvalid, match=r"flux1.gguf' is truncated or not GGUF"):
        load(folder, tiny_folder, transformer=file)


def test_a_gguf_of_another_model_is_refused(
    original: Tensors, folder: Path, tiny_folder: Path
) -> None:
    file = folder.parent / "llama.gguf"
    write_gguf(file, "llama", original, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UnsupportedModel, match="GGUF of 'llama': read are flux"):
        load(folder, tiny_folder, transformer=file)


def test_without_the_package_gguf_it_is_said_how_to_get_it(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder.parent / "flux1.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(KreaError, match=r"pip install 'krea_local\[gguf\]'"):
        load(folder, tiny_folder, transformer=file)


def test_paths_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "flux1.ckpt"
    pickled.write_bytes(pickle.dumps({}))
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    for model, files, error, match in (
        (folder, {"transformer": pickled}, WeightsInvalid, "is a pickle"),
        (pickled, {}, WeightsInvalid, "is a pickle"),
        (folder, {"transformer": folder}, InvalidRequest, "should be a file"),
        (folder, {"text_encoder_2": 3}, InvalidRequest, "text_encoder_2=3: should be a path"),
        (folder, {"transformer": tmp_path / "no.gguf"}, WeightsNotFound, "no file"),
        (tmp_path / "no.safetensors", {}, WeightsNotFound, "no file"),
        (there, {"transformer": there}, InvalidRequest, "and so is transformer="),
    ):
        with pytest.raises(error, match=match):
            krea_local.load(model, **files)  # type: ignore[arg-type]
