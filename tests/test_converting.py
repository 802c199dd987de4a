"""A transformer written in 8-bit floats stands for what the model is rounded to at "regular"."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import krea_local
from krea_local import InvalidRequest, OutputFailed, WeightsNotFound, cli, converting, speed
from krea_local.engine import Engine
from krea_local.pipeline import Krea

SIZE = {"width": 64, "height": 64}


def load(tiny_folder: Path, **options: object) -> Krea:
    common = {"device": "cpu", "dtype": "bfloat16", "progress": False}
    return krea_local.load(tiny_folder, **{**common, **options})  # type: ignore[arg-type]


def picture(model: Krea, level: str) -> bytes:
    given = {"image_size": SIZE, "num_inference_steps": 3, "seed": 1, "acceleration": level}
    return model.txt2img("a fox", **given).images[0].tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_it_draws_what_the_model_draws_at_regular(
    fused: bool,
    packed: bool,
    tiny_folder: Path,
    tmp_path: Path,
    krea: Krea,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "eight_bit_of", lambda device: torch.float8_e4m3fn)
    source = None
    if fused:
        state = native(krea).transformer.state_dict()
        source = tmp_path / "flux.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, source)
    file = krea_local.convert(
        tmp_path / "x.safetensors", tiny_folder, transformer=source, progress=False
    )
    assert file == tmp_path / "x.safetensors"
    wanted = load(tiny_folder)
    made = load(tiny_folder, transformer=file, packed=packed)
    assert native(made).transformer.is_kept_in_float8 == packed
    assert picture(made, "regular") == picture(wanted, "regular")
    assert picture(made, "none") != picture(wanted, "none")


def native(model: Krea) -> Engine:
    assert isinstance(model.engine, Engine)
    return model.engine


def test_only_matrices_inside_blocks_are_rounded(
    tiny_folder: Path, tmp_path: Path, krea: Krea
) -> None:
    krea_local.convert(tmp_path / "x.safetensors", tiny_folder, progress=False)
    before = native(krea).transformer.state_dict()  # the original checkpoint's names
    found = load_file(tmp_path / "x.safetensors")  # by the library itself
    rounded = {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    assert found.keys() == before.keys() | {f"{name}_scale" for name in rounded}
    assert len(rounded) > 10
    assert not any("norm" in name or "mod" in name or "_in" in name for name in rounded)
    for name, tensor in before.items():
        if name not in rounded:
            assert torch.equal(found[name], tensor.bfloat16()), name
            continue
        wide = found[name].float() * found[f"{name}_scale"][:, None]
        assert float((wide - tensor.float()).norm() / tensor.float().norm()) < 0.04, name
        largest = found[name].float().abs().amax(1)
        assert torch.equal(largest, torch.full_like(largest, 448.0)), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        assert reader.metadata()["made_by"].startswith("krea_local ")


@pytest.mark.parametrize("fused", [True, False])
def test_a_gguf_is_nearer_and_read_by_its_own_package(
    fused: bool, tiny_folder: Path, tmp_path: Path, krea: Krea
) -> None:
    state = native(krea).transformer.state_dict()
    source = None
    if fused:
        source = tmp_path / "flux.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, source)
    file = krea_local.convert(tmp_path / "x.gguf", tiny_folder, transformer=source, progress=False)
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == "flux"
    assert {tensor.name for tensor in reader.tensors} == state.keys()
    kinds: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        kinds[kind] = kinds.get(kind, 0) + 1
        shape = state[tensor.name].shape
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
        wanted = state[tensor.name].bfloat16().float()
        error = float((found - wanted).norm() / wanted.norm())
        assert error < (0.008 if kind == "Q8_0" else 1e-9), tensor.name
    assert kinds["Q8_0"] > 10
    assert kinds["BF16"] > 3
    assert kinds["F32"] > 10
    made = load(tiny_folder, transformer=file, packed=True)
    assert picture(made, "none") == picture(load(tiny_folder, transformer=file), "none")


def test_what_is_in_fewer_bits_already_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    file = krea_local.convert(tmp_path / "x.safetensors", tiny_folder, progress=False)
    for name in ("y.safetensors", "y.gguf"):
        with pytest.raises(InvalidRequest, match="weights in F8_E4M3 with scale: rounding them"):
            krea_local.convert(tmp_path / name, tiny_folder, transformer=file)
        assert not (tmp_path / name).exists()


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match=r"should end in \.safetensors or \.gguf"):
        krea_local.convert(tmp_path / "x.bin", tiny_folder)
    with pytest.raises(WeightsNotFound):
        krea_local.convert(tmp_path / "x.safetensors", tmp_path / "nowhere")
    for name in ("x.safetensors", "x.gguf"):
        with pytest.raises(OutputFailed, match="cannot write"):
            krea_local.convert(tmp_path / "no" / name, tiny_folder, progress=False)
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    with pytest.raises(OutputFailed, match="is there already"):
        krea_local.convert(there, tiny_folder)
    assert there.read_text() == "mine"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for name in ("x.safetensors", "x.gguf"):
        with pytest.raises(
            OutputFailed, match=r"it takes 0\.\d GB, and 0\.0 GB are free on its disk"
        ):
            krea_local.convert(tmp_path / name, tiny_folder, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf"])
def test_an_interrupted_one_leaves_nothing(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(converting.Bar):
        def advance(self, *given: object) -> None:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    monkeypatch.setattr(converting, "Bar", Bar)
    with pytest.raises(KeyboardInterrupt):
        krea_local.convert(tmp_path / name, tiny_folder, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_how_to_draw_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a file.safetensors"
    assert cli.main(["convert", str(file), "--model", "tiny", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert f"--model tiny --transformer '{file}' --acceleration regular" in said
    assert file.exists()
    assert cli.main(["convert", str(tmp_path / "x.gguf"), "--model", "tiny", "--quiet"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("x.gguf")
    assert cli.main(["convert", str(file), "--model", "tiny", "--quiet"]) == 1
    assert "is there already" in capsys.readouterr().err
