from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import COMMIT, checksum
from safetensors.torch import load_file, save_file

import krea_local
from krea_local import WeightsNotFound, cli, components, loading, verifying
from krea_local.checksums import write_note
from krea_local.weights import SAFETY_CHECKER_FILES

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
WEIGHTS = [
    TRANSFORMER,
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
    "safety_checker/model.safetensors",
]


def faults(model: Path | str) -> dict[str, str]:
    """What is bad, by its name."""
    checks = krea_local.verify(model, progress=False)
    return {one.name: one.fault for one in checks if one.fault}


@pytest.fixture
def noted_folder(broken_folder: Path) -> Path:
    """As `download --folder` leaves it, to be damaged."""
    for root in (broken_folder, broken_folder / "safety_checker"):
        for file in [path for path in root.rglob("*") if path.is_file()]:
            name = file.relative_to(root).as_posix()
            if not name.startswith((".cache", "safety_checker")):
                write_note(root, name, checksum(name, file.read_bytes()), COMMIT)
    return broken_folder


@pytest.fixture
def cached_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """As the hub's cache holds it, to be damaged."""
    storage = tmp_path / "models--some--where"
    folder = storage / "snapshots" / COMMIT
    (storage / "blobs").mkdir(parents=True)
    for file in [path for path in tiny_folder.rglob("*") if path.is_file()]:
        name = file.relative_to(tiny_folder).as_posix()
        blob = storage / "blobs" / checksum(name, file.read_bytes())
        shutil.copy(file, blob)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
    return folder


def test_a_good_folder_is_read_whole(tiny_folder: Path) -> None:
    checks = krea_local.verify(tiny_folder, progress=False)
    files = {path for path in tiny_folder.rglob("*") if path.is_file()}
    assert {one.path for one in checks} == files
    for one in checks:
        assert (one.fault, one.checksum, one.size) == (None, None, one.path.stat().st_size)
        count = len(load_file(one.path)) if one.path.suffix == ".safetensors" else 0
        assert one.tensors == count
        assert one.path == tiny_folder / one.name
    assert [one.fault for one in krea_local.verify("tiny", progress=False)] == [None] * len(files)


@pytest.mark.parametrize("kind", ["noted_folder", "cached_folder"])
def test_known_checksums_are_compared(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    checks = krea_local.verify(folder, progress=False)
    assert {one.fault for one in checks} == {None}
    for one in checks:
        assert one.checksum == ("sha256" if one.path.suffix == ".safetensors" else "git sha1")


@pytest.mark.parametrize("kind", ["noted_folder", "cached_folder"])
@pytest.mark.parametrize("name", [*WEIGHTS, "vae/config.json", "tokenizer/vocab.json"])
def test_a_flipped_bit_is_found_by_the_checksum(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    data = bytearray((folder / name).read_bytes())
    # The last bit of a weight, or a space in JSON: nothing but the checksum tells.
    place = len(data) - 2 if name in WEIGHTS else data.index(b" ")
    data[place] = data[place] ^ 1 if name in WEIGHTS else ord("\t")
    (folder / name).write_bytes(data)
    found = faults(folder)
    assert list(found) == [name]
    assert "its checksum is" in found[name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_without_checksums_a_truncated_file_is_found(broken_folder: Path, name: str) -> None:
    data = (broken_folder / name).read_bytes()
    (broken_folder / name).write_bytes(data[:-100])
    found = faults(broken_folder)
    assert list(found) == [name]
    assert "is truncated" in found[name]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_found(broken_folder: Path, name: str, value: float) -> None:
    state = load_file(broken_folder / name)
    bad = sorted(state)[-1]
    state[bad].view(-1)[-1] = value
    save_file(state, broken_folder / name, {"format": "pt"})
    assert faults(broken_folder) == {name: f"tensor {bad} holds NaN or infinity"}


def test_every_part_of_a_large_tensor_is_looked_at(
    broken_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "AT_ONCE", 7)
    assert faults(broken_folder) == {}
    state = load_file(broken_folder / TRANSFORMER)
    state["proj_out.weight"].view(-1)[100] = float("nan")
    save_file(state, broken_folder / TRANSFORMER, {"format": "pt"})
    assert list(faults(broken_folder)) == [TRANSFORMER]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_or_strange_or_misshapen_tensor_is_found(broken_folder: Path, name: str) -> None:
    state = load_file(broken_folder / name)
    some = next(key for key in sorted(state) if state[key].dim() == 2)
    for change, message in (
        ({key: tensor for key, tensor in state.items() if key != some}, "is missing"),
        ({**state, some: torch.zeros(3, 5)}, "(3, 5)"),
        ({**state, "what.weight": torch.zeros(3)}, "what.weight is not part of the model"),
    ):
        save_file(change, broken_folder / name, {"format": "pt"})
        ((where, fault),) = faults(broken_folder).items()
        assert where == name.split("/")[0]
        assert message in fault


def test_a_missing_shard_or_folder_or_link_is_found(
    broken_folder: Path, cached_folder: Path
) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    file = broken_folder / "text_encoder_2" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert any(
        "model-00001-of-00002.safetensors" in fault for fault in faults(broken_folder).values()
    )
    file.unlink()
    shutil.rmtree(broken_folder / "vae")
    assert any("no vae/ in" in fault for fault in faults(broken_folder).values())
    (cached_folder / TRANSFORMER).resolve().unlink()
    found = faults(cached_folder)
    assert list(found) == [TRANSFORMER]
    assert "is missing" in found[TRANSFORMER]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_2/tokenizer.json", '{"version": "1.0"}', "/tokenizer_2' cannot be read"),
        ("tokenizer/merges.txt", "#version: 0.2\n", "merges.txt' is truncated"),
        ("tokenizer/vocab.json", "{", "vocab.json' cannot be read"),
        ("scheduler/scheduler_config.json", '{"base_shift": "much"}', "base_shift='much'"),
        ("vae/config.json", "[]", "should hold a JSON object"),
        ("transformer/config.json", '{"in_channels": 3}', "no guidance embedding"),
        ("model_index.json", '{"_class_name": "Flux2Pipeline"}', "is FLUX.2"),
        ("safety_checker/preprocessor_config.json", "no", "cannot be read"),
    ],
)
def test_a_damaged_tokenizer_or_configuration_is_found(
    broken_folder: Path, name: str, content: str, message: str
) -> None:
    (broken_folder / name).write_text(content)
    assert any(message in fault for fault in faults(broken_folder).values())


def test_pickles_are_not_opened(broken_folder: Path) -> None:
    (broken_folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert faults(broken_folder) == {}


def test_no_model_is_built_in_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = components.load_pretrained
    devices = []

    def load_pretrained(*arguments: object, **options: object) -> object:
        model = original(*arguments, **options)  # type: ignore[arg-type]
        devices.extend({parameter.device.type for parameter in model.parameters()})
        return model

    for module in (components, loading):
        monkeypatch.setattr(module, "load_pretrained", load_pretrained)
    assert faults(tiny_folder) == {}
    assert devices == ["meta"] * 3


def test_what_is_not_there_is_told() -> None:
    for name in ("krea", "some/where", "/nowhere", "nothing"):
        with pytest.raises(WeightsNotFound):
            krea_local.verify(name)


def test_the_command_names_what_is_bad_and_what_to_do(
    cached_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(cached_folder)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == sum(1 for path in cached_folder.rglob("*") if path.is_file())
    assert all(line.startswith("ok ") for line in out.splitlines())
    assert any(
        line.startswith(f"ok   {TRANSFORMER}  991.2 kB  sha256, ")
        and line.endswith("finite tensors")
        for line in out.splitlines()
    )
    assert err == ""
    file = cached_folder / TRANSFORMER
    data = file.read_bytes()
    file.write_bytes(data[:-2] + bytes(2))
    assert cli.main(["verify", str(cached_folder), "--quiet"]) == 3
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith(f"BAD  {file}: its checksum is")
    assert f"delete {file.resolve()} and run `krea-local download` again" in err


def test_the_command_says_what_it_could_not_check(
    broken_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(broken_folder / "safety_checker")
    assert cli.main(["verify", str(broken_folder)]) == 0
    err = capsys.readouterr().err
    count = sum(1 for path in broken_folder.rglob("*") if path.is_file())
    assert f"no checksum is known of {count} of {count} files" in err
    assert "there is no safety checker" in err
    assert cli.main(["verify", "/nowhere"]) == 3
    assert len(SAFETY_CHECKER_FILES) == 3
