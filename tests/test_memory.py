from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import krea_local
from krea_local import InvalidRequest, OutOfMemory, memory
from krea_local.info import describe, fits, gather, takes
from krea_local.memory import check_offload, explained_out_of_memory, on_device
from krea_local.plan import FLUX1, need
from krea_local.transformer import Config, FluxTransformer

SIZE = {"width": 64, "height": 64}
META = torch.device("meta")  # a device without memory stands in for a GPU: copies really move


class Tied(nn.Module):
    """Two layers that share a weight, as T5's embeddings do, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(4))


def places(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


def test_models_are_on_the_device_inside_and_the_very_same_tensors_after() -> None:
    module = Tied()
    before = [*module.parameters(), *module.buffers()]
    with on_device([module], META):
        assert places(module) == {"meta"}
        assert module.second.weight is module.first.weight  # copied once
        assert isinstance(module.first.weight, nn.Parameter)
    after = [*module.parameters(), *module.buffers()]
    assert len(before) == len(after) == 4
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_brings_the_models_home(error: type[BaseException]) -> None:
    module = Tied()
    with pytest.raises(error), on_device([module], META):
        raise error
    assert places(module) == {"cpu"}


def test_a_failed_copy_brings_back_what_was_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Tied()
    module.second.bias = nn.Parameter(torch.zeros(4))
    copies = 0
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        nonlocal copies
        copies += 1
        if copies == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), on_device([module], META):
        pass
    assert places(module) == {"cpu"}


def test_nesting_moves_nothing_twice() -> None:
    module = Tied()
    with on_device([module], META):
        inside = module.first.weight
        with on_device([module], META):
            assert module.first.weight is inside
        assert module.first.weight is inside


def test_models_take_turns_and_the_picture_is_the_same(
    tiny_folder: Path, krea: krea_local.Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krea_local import placing

    model = krea_local.load(tiny_folder, device="cpu", dtype="float32", offload="model")
    parts = {
        id(getattr(model.models, name)): name for name in ("vae", "text_encoder", "text_encoder_2")
    }
    present: list[str] = []
    turns: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def recorded(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
        # Of our transformer single layers are asked for, all but its modulation.
        names = dict.fromkeys(parts.get(id(module), "transformer") for module in modules)
        new = [name for name in names if name not in present]
        present.extend(new)
        if new:
            turns.append(tuple(present))
        with on_device(modules, device):
            yield
        for name in new:
            present.remove(name)

    monkeypatch.setattr(placing, "on_device", recorded)
    arguments = {"num_inference_steps": 10, "seed": 1, "num_images": 2}
    drawn = model.txt2img("a fox", image_size=SIZE, **arguments)
    assert turns == [("text_encoder", "text_encoder_2"), ("transformer",), ("vae",)]
    resident = krea.txt2img("a fox", image_size=SIZE, **arguments)
    assert [i.tobytes() for i in drawn.images] == [i.tobytes() for i in resident.images]


class Runtime:
    """In place of CUDA's runtime: which host memory was locked."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert address not in self.locked
        self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.locked[address]


def test_large_weights_in_host_memory_are_locked_until_they_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(4, 4), nn.Linear(512, 1024))
    model[2].weight = model[0].weight  # tied: one piece of memory
    model.append(nn.Linear(512, 1024, device="meta"))
    memory.pin([model, model[0]], torch.device("cpu"))
    assert runtime.locked == {}
    memory.pin([model, model[0]], torch.device("cuda", 0))
    assert runtime.locked == {model[0].weight.data_ptr(): 512 * 1024 * 4}
    del model
    assert runtime.locked == {}


def test_host_memory_that_cannot_be_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reports(*arguments: object, **named: object) -> None:
        raise RuntimeError("CUDA error: out of memory")  # what the next call would get to see

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    monkeypatch.setattr(torch, "zeros", reports)
    model = nn.Linear(512, 1024)
    memory.pin([model], torch.device("cuda", 0))
    assert "0.0 GiB of host memory cannot be locked (CUDA error 2; `ulimit -l`" in caplog.text


def test_running_out_of_memory_says_what_would_help() -> None:
    message = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …"
    with (
        pytest.raises(OutOfMemory, match=r"\(CUDA out of memory. Tried .* 20.00 GiB\): try less"),
        explained_out_of_memory("try less"),
    ):
        raise torch.OutOfMemoryError(message)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_every_way_of_running_out_is_known(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match="try less"), explained_out_of_memory("try less"):
        raise error
    with pytest.raises(RuntimeError, match="else"), explained_out_of_memory("try less"):
        raise RuntimeError("something else")


def test_holding_the_error_does_not_hold_the_memory() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def exhausted() -> None:
        large = torch.zeros(1000)
        seen.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    try:
        with explained_out_of_memory("try less"):
            exhausted()
    except OutOfMemory as error:
        assert error.__cause__ is not None
        assert seen[0]() is None  # while the error, and with it its traceback, is alive


def test_running_out_while_drawing_leaves_the_model_usable(krea: krea_local.Krea) -> None:
    def exhausted(progress: krea_local.Progress) -> None:
        if progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    arguments = {"image_size": SIZE, "num_inference_steps": 3, "seed": 1}
    expected = krea.txt2img("a fox", **arguments).images[0].tobytes()
    with pytest.raises(OutOfMemory, match="load with memory='auto'"):
        krea.txt2img("a fox", on_step=exhausted, **arguments)
    assert krea.txt2img("a fox", **arguments).images[0].tobytes() == expected


def test_offload_is_one_of_four() -> None:
    assert check_offload("model") == "model"
    with pytest.raises(
        InvalidRequest, match="'some': should be one of 'none', 'modulation', 'model', 'blocks'"
    ):
        krea_local.load("tiny", offload="some")


def test_the_sizes_are_those_of_the_counted_parameters() -> None:
    from benchmarks.random_model import CONFIGS, build

    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in build(name).parameters()) for name in CONFIGS}
    # weights.md and the GPU table stand on these.
    assert counts["transformer"] == 11_901_408_320
    assert counts["text_encoder_2"] == pytest.approx(4.762e9, rel=1e-3)
    assert counts["text_encoder"] == pytest.approx(123.1e6, rel=1e-3)
    assert counts["vae"] == pytest.approx(83.8e6, rel=1e-3)
    with torch.device("meta"):
        native = FluxTransformer(Config.of(CONFIGS["transformer"]))
        t5 = build("text_encoder_2")

    def size(modules: list[nn.Module]) -> int:
        return 2 * sum(p.numel() for module in modules for p in module.parameters())

    blocks = [size(block) for block in native.step_blocks()]
    assert list(FLUX1.blocks) == blocks
    assert FLUX1.outside == pytest.approx(size(native.step_modules()) - sum(blocks), rel=2e-3)
    assert FLUX1.modulation == pytest.approx(size(native.modulations()), rel=2e-3)
    assert list(FLUX1.t5_blocks) == pytest.approx(
        [size([block]) for block in t5.encoder.block], rel=2e-3
    )
    assert FLUX1.t5 == pytest.approx(2 * counts["text_encoder_2"], rel=1e-3)
    assert FLUX1.text_encoder == pytest.approx(2 * counts["text_encoder"], rel=1e-3)
    assert FLUX1.vae == pytest.approx(2 * counts["vae"], rel=1e-3)
    assert need("none") == pytest.approx(sum(blocks) / 2**30 + 6.05 + 0.08 + 9.7 + 1.75, rel=1e-2)


def test_info_tells_what_fits_and_why_not() -> None:
    assert fits(80.0)["none"].startswith("fits: needs about 33.")
    assert fits(24.0)["none"].startswith("does not fit: needs about 33.")
    assert fits(24.0)["model"].startswith("fits: needs about 17.2")
    assert "16.0 are free" in fits(16.0)["model"]
    facts = gather()
    facts["gpus"] = [
        {
            "index": 0,
            "name": "NVIDIA H200",
            "capability": "9.0",
            "total_gib": 140.0,
            "free_gib": 139.0,
            "fits": fits(139.0),
            "takes": takes(139.0),
        }
    ]
    text = describe(facts)
    assert "NVIDIA H200, 139.0 of 140.0 GiB free" in text
    assert "offload='none': fits" in text
    assert "of these load takes 'none'" in text
    assert takes(30.0) == "'modulation'"
    assert takes(11.0).startswith("'blocks', 3")
    assert "the least is" in takes(1.0)
    assert torch.__version__.split("+")[0] in text
