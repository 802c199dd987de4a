"""Numbers get from files to their places bit by bit, and nothing is left behind if they do not."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

import krea_local
from krea_local import WeightsInvalid, WeightsNotFound, components, loading, reading, weights
from krea_local.files import FLOAT8, FLOATS
from krea_local.reading import BUFFERS, DTYPES, PIECE, Numbers, Transfer, numbers_of, read

CPU = torch.device("cpu")
SHAPES = [(), (0,), (1,), (3, 0), (7,), (5, 3), (2, 3, 5), (33, 31), (256, 40)]


class Late:
    """A lane that copies as late as it may: when it is waited for."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.waits: list[Callable[[], object]] = []
        self.finished = False

    def memory(self, nbytes: int) -> Tensor:
        self.nbytes += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        left = list(pairs)

        def wait() -> None:
            while left:
                target, source = left.pop()
                target.copy_(source)

        self.waits.append(wait)
        return wait

    def finish(self) -> None:
        for wait in self.waits:
            wait()
        self.finished = True


def random_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        f"{i}": torch.randn(shape, generator=random).to(dtype) for i, shape in enumerate(SHAPES)
    }


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit by bit."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return torch.equal(
        ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
    )


def to_empty(file: Path, dtype: torch.dtype | None = None) -> tuple[list[Transfer], list[Tensor]]:
    """Every tensor of `file` to memory that holds something else."""
    found = numbers_of(file)
    targets = [torch.full(one.shape, 7.0).to(dtype or one.dtype) for one in found.values()]
    pairs = zip(found.values(), targets, strict=True)
    return [Transfer(one, target, "vae") for one, target in pairs], targets


def count(component: str, nbytes: int) -> None:
    """Progress that nobody looks at."""


def readers() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("krea_local-reader")]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Most tensors are larger than a piece."""
    monkeypatch.setattr(reading, "PIECE", 64)
    return 64


@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("piece", [64, PIECE])
def test_tensors_are_those_that_safetensors_reads(
    piece: int,
    kept: torch.dtype,
    wanted: torch.dtype | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PIECE", piece)
    file = tmp_path / "a.safetensors"
    save_file(random_tensors(kept), file)
    transfers, targets = to_empty(file, wanted)
    seen: list[int] = []
    read(transfers, lambda component, nbytes: seen.append(nbytes))
    theirs = load_file(file)
    names = list(numbers_of(file))
    assert set(names) == set(theirs)
    for name, target in zip(names, targets, strict=True):
        assert same(target, theirs[name].to(wanted or kept)), name
    assert sum(seen) == sum(tensor.nbytes for tensor in theirs.values())


def test_a_buffer_is_not_filled_again_before_it_is_copied(
    small_pieces: int, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_tensors(torch.float32), file)
    lane = Late()
    transfers, targets = to_empty(file, torch.float64)
    read(transfers, count, lane_of=lambda device: lane)
    theirs = load_file(file)
    for name, target in zip(numbers_of(file), targets, strict=True):
        assert same(target, theirs[name].double()), name
    assert lane.finished
    assert len(lane.waits) > 10 * BUFFERS
    assert lane.nbytes <= BUFFERS * small_pieces
    assert BUFFERS * PIECE <= 2**29  # of host memory, however large the files


def test_what_fits_is_read_right_to_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_tensors(torch.bfloat16), file)
    lane = Late()
    read(to_empty(file)[0], count, lane_of=lambda device: lane)
    assert (lane.nbytes, lane.waits) == (0, [])


def test_numbers_may_lie_anywhere_in_a_file(tmp_path: Path) -> None:
    """safetensors' own writer begins with the largest dtype, so that all lie at their multiples."""
    tensors = {
        "a": torch.arange(3).to(torch.float8_e4m3fn),
        "b": torch.arange(5).float(),
        "c": torch.arange(1).bfloat16(),
        "d": torch.arange(7).double(),
    }
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.view(torch.uint8).tolist())
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype)
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for dtype in (None, torch.float32):
        transfers, targets = to_empty(file, dtype)
        read(transfers, count)
        for target, tensor in zip(targets, tensors.values(), strict=True):
            assert same(target, tensor.to(dtype or tensor.dtype))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]},
    ],
)
def test_a_tensor_whose_bytes_are_not_its_shapes_is_named(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    text = json.dumps({"w": entry}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(WeightsInvalid, match=r"a.safetensors': tensor w has .* bytes, which are"):
        numbers_of(file)


def test_a_file_that_ends_while_it_is_read_is_named(small_pieces: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_tensors(torch.float32), file)
    for dtype in (torch.float32, torch.bfloat16):
        transfers, _ = to_empty(file, dtype)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(WeightsInvalid, match=r"a.safetensors' is truncated: fetch it again"):
            read(transfers, count)
        assert readers() == []
        save_file(random_tensors(torch.float32), file)


def test_a_file_that_is_gone_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_tensors(torch.float32), file)
    transfers, targets = to_empty(file)
    file.unlink()
    with pytest.raises(WeightsNotFound, match=r"no file .*a.safetensors"):
        read(transfers, count)
    memory = Path("/proc/self/mem")  # whose first page fails with an I/O error
    if memory.exists():
        unreadable = Numbers(memory, 0, (7,), torch.float32)
        with pytest.raises(WeightsNotFound, match=r"cannot read '/proc/self/mem': Input/output"):
            read([Transfer(unreadable, targets[4], "vae")], count)
    assert readers() == []


def test_an_error_in_one_thread_stops_the_others(small_pieces: int, tmp_path: Path) -> None:
    good = tmp_path / "b.safetensors"
    save_file({"w": torch.ones(2**17)}, good)
    transfers, targets = to_empty(good, torch.bfloat16)
    bad = Transfer(Numbers(tmp_path / "a.safetensors", 0, (7,), torch.float32), targets[0][:7], "")
    lane = Late()
    seen: list[int] = []
    with pytest.raises(WeightsNotFound, match="a.safetensors"):
        read(
            [*transfers, bad],
            lambda component, nbytes: seen.append(nbytes),
            lane_of=lambda device: lane,
        )
    assert len(seen) <= 2 * BUFFERS  # of 8192
    assert lane.finished
    assert readers() == []


def test_ctrl_c_stops_all_threads(small_pieces: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2**17)}, file)
    seen: list[int] = []

    def interrupted(component: str, nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)

    lane = Late()
    with pytest.raises(KeyboardInterrupt):
        read(to_empty(file, torch.bfloat16)[0], interrupted, lane_of=lambda device: lane)
    assert 3 <= len(seen) <= 5
    assert lane.finished
    assert readers() == []
    transfers, (target,) = to_empty(file)
    read(transfers, count)  # and the next one is right
    assert (target == 1).all()


def test_every_dtype_that_files_let_pass_is_read() -> None:
    assert set(DTYPES) == {*FLOATS, *FLOAT8, "U8"}  # bytes, of numbers that are packed


def test_a_file_that_ends_during_load_is_named(
    broken_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = broken_folder / "vae" / "diffusion_pytorch_model.safetensors"

    def late(transfers: list[Transfer], on_bytes: object) -> None:
        os.truncate(file, file.stat().st_size - 1)
        read(transfers, count)

    monkeypatch.setattr(reading, "read", late)
    with pytest.raises(WeightsInvalid, match=r"vae/diffusion_pytorch_model.* is truncated"):
        krea_local.load(broken_folder, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("kind", "name"), [(CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoder_is_the_one_that_transformers_reads(
    kind: Any, name: str, dtype: torch.dtype, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder / name
    with monkeypatch.context() as patch:
        patch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("not needed"))
        ours = components.load_pretrained(kind, folder, dtype=dtype, device=CPU)
    monkeypatch.setattr(components, "_known_pretrained", lambda *_: None)
    theirs = components.load_pretrained(kind, folder, dtype=dtype, device=CPU)
    for wanted, found in (
        (dict(theirs.named_parameters()), dict(ours.named_parameters())),
        (dict(theirs.named_buffers()), dict(ours.named_buffers())),
    ):
        assert list(found) == list(wanted)
        assert all(same(found[key], wanted[key]) for key in wanted)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    tokens = torch.arange(1, 9)[None]
    with torch.inference_mode():
        assert same(*(model(tokens).last_hidden_state for model in (ours, theirs)))


def test_t5s_tied_weights_are_one(tiny_folder: Path) -> None:
    folder = tiny_folder / "text_encoder_2"
    t5 = components.load_pretrained(T5EncoderModel, folder, dtype=torch.float32, device=CPU)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


def test_names_that_transformers_has_changed_are_left_to_it(
    broken_folder: Path, krea: krea_local.Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "CLIP_PREFIX", "no prefix")
    seen: list[Path] = []
    original = CLIPTextModel.from_pretrained

    def from_pretrained(folder: str, **options: object) -> object:
        seen.append(Path(folder))
        return original(folder, **options)

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", from_pretrained)
    models = loading.load_models(weights.find(broken_folder), dtype=torch.float32, device=CPU)
    assert seen == [broken_folder / "text_encoder"]
    wanted = krea.models.text_encoder.state_dict()
    found = models.text_encoder.state_dict()
    assert all(same(found[name], wanted[name]) for name in wanted)
