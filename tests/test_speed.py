"""Levels of acceleration, through the pipeline that runs them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import krea_local
from krea_local import (
    Cancelled,
    KreaWarning,
    OutOfMemory,
    Txt2ImgRequest,
    cluster,
    engine,
    kernels,
    layers,
    speed,
    transformer,
)
from krea_local.kernels import PLAIN
from krea_local.pipeline import Krea
from krea_local.skipping import Skipping, StepCache
from krea_local.speed import LEVELS, Settings
from krea_local.transformer import Execution, FluxTransformer

CPU = torch.device("cpu")
SMALL = {"width": 64, "height": 96}


@pytest.fixture
def fresh(tiny_folder: Path) -> Krea:
    """A model whose settings a test may change."""
    return krea_local.load(tiny_folder, device="cpu", dtype="float32")


FORMATS = [torch.float8_e4m3fn, torch.int8]


@pytest.fixture(params=FORMATS)
def eight_bit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The CPU emulates these 8-bit products, as if it had them."""
    monkeypatch.setattr(speed, "eight_bit_of", lambda device: request.param)
    return request.param


def latents(krea: Krea, seeds: list[int], **arguments: Any) -> torch.Tensor:
    request = Txt2ImgRequest.parse({"prompt": "a fox", "num_inference_steps": 12, **arguments})
    request = krea._with_own_defaults(request)
    return krea.latents(request, seeds=seeds, width=64, height=96)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_levels_build_on_one_another_and_only_the_first_is_lossless() -> None:
    none, regular, high = (LEVELS[level] for level in ("none", "regular", "high"))
    assert all(step.lossless for step in none)
    assert [step.name for step in regular[: len(none)]] == [step.name for step in none]
    assert [step.name for step in high[: len(regular)]] == [step.name for step in regular]
    assert not any(step.lossless for step in high[len(none) :])
    for step in high:
        assert step.what.endswith(".")
        assert step.measured


def test_the_cpu_runs_what_it_can_and_says_what_it_cannot(krea: Krea) -> None:
    transformer = krea.models.transformer
    place = speed.Place(CPU, transformer)
    assert speed.settings_of(LEVELS["none"], place) == (Settings(), ())
    settings, notices = speed.settings_of(LEVELS["high"], place)
    assert settings == Settings(skipping=Skipping())
    assert notices == (
        "runs in float32, at its speed: device='cpu' has no 8-bit products (RTX 30, A100 and newer "
        "have)",
    )


@pytest.mark.parametrize(
    ("capability", "eight_bit"),
    [
        *[((7, 5), None), ((8, 0), torch.int8), ((8, 6), torch.int8), ((8, 7), torch.int8)],
        *[(new, torch.float8_e4m3fn) for new in ((8, 9), (9, 0), (10, 0), (12, 0))],
    ],
)
def test_a_gpu_multiplies_the_8_bits_that_it_has(
    krea_bfloat16: Krea,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    eight_bit: torch.dtype | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    checked = []
    monkeypatch.setattr(speed, "check_product", lambda *arguments: checked.append(arguments))
    cuda = torch.device("cuda", 0)
    place = speed.Place(cuda, krea_bfloat16.models.transformer)
    settings, notice = speed.eight_bit_linears(Settings(), place)
    assert settings == Settings(eight_bit=eight_bit)
    if eight_bit is None:
        assert notice == (
            "runs in bfloat16, at its speed: this GPU has no 8-bit products (RTX 30, A100 and "
            "newer have)"
        )
        assert checked == []
    else:
        assert notice is None
        assert checked == [(eight_bit, PLAIN, cuda, torch.bfloat16)]


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_a_gpu_whose_8_bit_products_do_not_work_says_so_and_runs(
    krea: Krea,
    krea_bfloat16: Krea,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    place = speed.Place(torch.device("cuda", 0), krea.models.transformer)
    settings, notice = speed.eight_bit_linears(Settings(), place)
    assert (settings.eight_bit, notice) == (
        None,
        "runs in float32, at its speed: 8-bit products need dtype='bfloat16'",
    )
    # It should, by its number, and cannot: this torch has no such GPU at all.
    place = speed.Place(place.device, krea_bfloat16.models.transformer)
    settings, notice = speed.eight_bit_linears(Settings(), place)
    assert settings.eight_bit is None
    assert notice is not None
    assert notice.startswith("runs in bfloat16, at its speed: 8-bit products do not work here: ")


@pytest.mark.parametrize("format", FORMATS)
def test_an_8_bit_product_is_checked_before_use(
    monkeypatch: pytest.MonkeyPatch, format: torch.dtype
) -> None:
    layers.check_product(format, PLAIN, CPU, torch.float32)
    project = layers.EightBitLinear.project
    monkeypatch.setattr(
        layers.EightBitLinear,
        "project",
        lambda self, x, out: project(self, x, out).mul_(1.1),
    )
    with pytest.raises(ValueError, match="the product differs by"):
        layers.check_product(format, PLAIN, CPU, torch.float32)


@pytest.mark.parametrize("small", [False, True])
def test_a_kernel_that_is_wrong_at_one_size_of_product_is_found(small: bool) -> None:
    def wrong(x: kernels.Quantized, *arguments: Any, **named: Any) -> torch.Tensor:
        result = PLAIN.int8_product(x, *arguments, **named)
        return result.mul_(torch.nan) if (len(x.values) < 100) == small else result

    with pytest.raises(ValueError, match="the product differs by nan"):
        layers.check_product(
            torch.int8, dataclasses.replace(PLAIN, int8_product=wrong), CPU, torch.bfloat16
        )


def test_the_kernel_of_integers_is_right_at_both_sizes_of_product() -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers.check_product(torch.int8, kernels.triton_kernels(), device, torch.bfloat16)


def test_regular_runs_in_8_bits_and_none_stays_exact(
    fresh: Krea, krea: Krea, eight_bit: torch.dtype
) -> None:
    exact = latents(fresh, [1])
    rounded = latents(fresh, [1], acceleration="regular")
    assert fresh.prepare("regular").eight_bit == eight_bit
    assert fresh.engine._eight_bit.double_blocks[0].img_attn.qkv.weight.dtype == eight_bit
    assert 1e-4 < distance(rounded, exact) < {FORMATS[0]: 0.1, FORMATS[1]: 0.03}[eight_bit]
    assert torch.equal(rounded, latents(fresh, [1], acceleration="regular"))
    assert torch.equal(exact, latents(fresh, [1]))
    assert torch.equal(exact, latents(krea, [1]))


@pytest.mark.usefixtures("eight_bit")
def test_a_plan_counts_the_weights_in_8_bits(tiny_folder: Path) -> None:
    for level in ("none", "regular"):
        files = {"device": "cpu", "dtype": "bfloat16", "memory": "40GB", "acceleration": level}
        made = krea_local.load(tiny_folder, **files).plan
        assert made is not None
        assert made.eight_bit == (level != "none")


def test_the_weights_of_one_format_make_room_for_those_of_another(fresh: Krea) -> None:
    found = {}
    for eight_bit in (*FORMATS, FORMATS[0]):
        fresh.engine.settings["regular"] = Settings(eight_bit=eight_bit)
        drawn = latents(fresh, [1], acceleration="regular")
        assert torch.equal(drawn, found.setdefault(eight_bit, drawn))
        variant = fresh.engine._eight_bit
        assert variant is not None
        assert variant.eight_bit == eight_bit
    assert not torch.equal(found[FORMATS[0]], found[FORMATS[1]])


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("offload", ["modulation", "model", "blocks"])
def test_offloading_draws_the_same_at_every_level(
    tiny_folder: Path, fresh: Krea, offload: str
) -> None:
    other = krea_local.load(tiny_folder, device="cpu", dtype="float32", offload=offload)
    for level in ("none", "regular", "high"):
        wanted = latents(fresh, [1, 2], acceleration=level)
        assert torch.equal(latents(other, [1, 2], acceleration=level), wanted)


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_offloaded_weights_are_all_there_when_they_are_needed(
    tiny_folder: Path, offload: str
) -> None:
    # The meta device stands in for a GPU: a tensor left behind on the CPU would be an error.
    krea = krea_local.load(tiny_folder, device="cpu", dtype="float32", offload=offload)
    krea.device = krea.engine.device = krea._placing.device = torch.device("meta")
    for stream in krea.engine._streams.values():
        stream.device = krea.device
    krea.encode_prompt = lambda prompt: (  # type: ignore[method-assign]
        torch.empty(1, 512, 32, device="meta"),
        torch.empty(1, 32, device="meta"),
        None,
    )
    found = latents(krea, [1])
    assert found.device.type == "meta"
    transformer = krea.models.transformer
    assert {p.device.type for p in transformer.parameters()} == {"cpu"}


def test_a_level_is_chosen_once(fresh: Krea, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    chosen = speed.settings_of
    monkeypatch.setattr(
        speed, "settings_of", lambda *arguments: calls.append(1) or chosen(*arguments)
    )
    arguments = {"image_size": SMALL, "num_inference_steps": 1, "acceleration": "high"}
    with pytest.warns(KreaWarning, match="'high': runs in float32"):
        first = fresh.txt2img("a fox", **arguments)
    second = fresh.txt2img("a fox", **arguments)  # said aloud once, and kept in every result
    assert second.notices == first.notices != ()
    assert len(calls) == 1


@pytest.mark.usefixtures("eight_bit")
def test_high_skips_steps_by_a_pattern(fresh: Krea, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []
    fresh.prepare("high")
    fresh.engine.settings["high"] = Settings(
        skipping=Skipping(computed=0.5, first_full=2, last_full=1)
    )
    double = fresh.models.transformer.double_blocks
    once = transformer._Run.double
    monkeypatch.setattr(
        transformer._Run,
        "double",
        lambda self, *arguments: blocks.append(1) or once(self, *arguments),
    )
    skipped = latents(fresh, [1], acceleration="high")
    assert len(blocks) == 6 * len(double) + 6  # 12 steps, half of them the first block only
    full = latents(fresh, [1])
    assert 0 < distance(skipped, full) < 0.3


@pytest.mark.usefixtures("eight_bit")
def test_a_call_that_is_aborted_does_not_touch_the_next(fresh: Krea) -> None:
    arguments = {"image_size": SMALL, "num_inference_steps": 12, "acceleration": "high"}

    def stop(progress: krea_local.Progress) -> None:
        if progress.step == 7:
            raise Cancelled("enough")

    wanted = fresh.txt2img("a fox", seed=1, **arguments).images[0].tobytes()
    with pytest.raises(Cancelled):
        fresh.txt2img("a cat", seed=2, on_step=stop, **arguments)
    assert fresh.txt2img("a fox", seed=1, **arguments).images[0].tobytes() == wanted
    # Nor does one image of a call touch another.
    two = fresh.txt2img("a fox", seed=0, num_images=2, **arguments)
    assert two.images[1].tobytes() == wanted


def test_modulation_is_computed_once_for_all_steps_and_images_of_a_call(
    fresh: Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    condition = FluxTransformer.condition

    def counted(self: FluxTransformer, *arguments: Any, **named: Any) -> object:
        calls.append(len(named["timesteps"]))
        return condition(self, *arguments, **named)

    monkeypatch.setattr(FluxTransformer, "condition", counted)
    arguments = {"image_size": SMALL, "num_inference_steps": 5}
    fresh.txt2img("a fox", num_images=3, **arguments)
    assert calls == [5]
    fresh.txt2img("a fox", seed=9, **arguments)  # the same prompt, size and steps
    assert calls == [5]
    for changed in (
        {"prompt": "a cat"},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 4},
        {"image_size": {"width": 96, "height": 64}},  # as many tokens, elsewhere
    ):
        fresh.txt2img("a fox", **arguments)
        before = len(calls)
        fresh.txt2img(**{"prompt": "a fox", **arguments, **changed})
        assert len(calls) == before + 1, changed


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: every way in which Python reads a tensor's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.count += func in (
            torch.ops.aten.item.default,
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize(
    ("acceleration", "skipping", "waits"),
    [
        ("none", None, 0),
        ("regular", None, 0),
        ("high", Skipping(computed=0.5), 0),
        ("high", Skipping(threshold=0, first_full=4, last_full=2), 12 - 4 - 2),
    ],
)
def test_the_loop_waits_for_nothing_but_a_thresholds_one_number_a_step(
    fresh: Krea, acceleration: str, skipping: Skipping | None, waits: int
) -> None:
    settings = fresh.prepare(acceleration)
    fresh.engine.settings[acceleration] = dataclasses.replace(settings, skipping=skipping)
    latents(fresh, [1], acceleration=acceleration)  # the prompt is encoded, the tables made
    with Waits() as seen:
        latents(fresh, [2], acceleration=acceleration)
    assert seen.count == waits


def broken(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("PassManager::run failed\nand a long trace")


@pytest.mark.usefixtures("eight_bit")
def test_8_bit_products_that_fail_in_use_go_before_the_kernels_do(
    fresh: Krea, krea: Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = dataclasses.replace(PLAIN, name="triton")
    settings = fresh.prepare("regular")
    monkeypatch.setattr(layers.EightBitLinear, "project", broken)
    fast = Execution(kernels=same)
    fresh.engine.settings["regular"] = dataclasses.replace(settings, execution=fast)
    arguments = {"image_size": SMALL, "num_inference_steps": 2, "seed": 1}
    with pytest.warns(KreaWarning, match="runs without 8-bit products from now on, slower: Pass"):
        drawn = fresh.txt2img("a fox", acceleration="regular", **arguments)
    assert fresh.engine.settings["regular"] == Settings(fast)
    assert fresh.engine._eight_bit is None  # 8 GiB that nobody needs
    assert drawn.images[0].tobytes() == krea.txt2img("a fox", **arguments).images[0].tobytes()


def test_a_repeated_step_is_not_compared_with_itself(fresh: Krea) -> None:
    made: list[StepCache] = []

    class Recorded(StepCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    fresh.prepare("none")
    wanted = None
    for fail_at in (None, 6):
        calls = []

        def late(
            *arguments: Any, calls: list[int] = calls, fail: Any = fail_at, **named: Any
        ) -> Any:
            calls.append(1)  # the last of a step's four blocks
            if fail is not None and len(calls) == 4 * fail + 4:
                raise RuntimeError("late")
            return PLAIN.qk_norm_rotary(*arguments, **named)

        fast = Execution(kernels=dataclasses.replace(PLAIN, qk_norm_rotary=late))
        skipping = Skipping(threshold=1e-9, first_full=2, last_full=1)
        fresh.engine.settings["none"] = Settings(fast, skipping=skipping)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "StepCache", Recorded)
            found = latents(fresh, [1])
        wanted = found if wanted is None else wanted
        assert made[-1].skipped == []
        assert torch.equal(found, wanted)


def test_an_interrupted_choice_of_kernels_is_made_again(
    fresh: Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(speed, "settings_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.prepare("high")
    assert fresh.prepare("high").skipping == Skipping()


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("level", ["none", "regular", "high"])
def test_a_kernel_that_fails_in_use_costs_speed_and_not_the_picture(
    fresh: Krea, krea: Krea, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = fresh.prepare(level)
    operations = dataclasses.replace(PLAIN, qk_norm_rotary=broken)
    fresh.engine.settings[level] = dataclasses.replace(
        settings, execution=Execution(kernels=operations)
    )
    arguments = {"image_size": SMALL, "num_inference_steps": 6, "seed": 1, "acceleration": level}
    told = "failed and runs in plain torch from now on, slower: PassMan"
    with pytest.warns(KreaWarning, match=told):
        drawn = fresh.txt2img("a fox", **arguments)
    assert "and a long trace" not in drawn.notices[0]
    plain = krea.txt2img("a fox", **{**arguments, "acceleration": "none"})
    if level != "high":  # which still skips
        assert drawn.images[0].tobytes() == plain.images[0].tobytes()
    assert caplog.text.count("is repeated in plain torch") == 1  # not at every step
    again = fresh.txt2img("a fox", **arguments)
    assert again.images == drawn.images
    assert again.notices == drawn.notices


def test_what_fails_in_plain_torch_too_is_an_error(fresh: Krea) -> None:
    fresh.engine.settings["none"] = Settings(
        Execution(kernels=dataclasses.replace(PLAIN, qk_norm_rotary=broken))
    )
    with torch.no_grad():
        fresh.models.transformer.img_in = None
    with pytest.raises(AttributeError):
        fresh.txt2img("a fox", image_size=SMALL, num_inference_steps=1)


def test_a_failed_step_is_not_repeated_where_other_processes_wait(fresh: Krea) -> None:
    class Alone(cluster.Ulysses):
        def __init__(self) -> None:
            self.rank, self.size = 0, 1

    fresh.engine.group = Alone()
    fresh.engine.settings["none"] = Settings(
        Execution(kernels=dataclasses.replace(PLAIN, qk_norm_rotary=broken))
    )
    with pytest.raises(RuntimeError, match="PassManager"):
        fresh.txt2img("a fox", image_size=SMALL, num_inference_steps=1)


def test_running_out_of_memory_is_no_reason_to_repeat(fresh: Krea) -> None:
    def exhausted(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    operations = dataclasses.replace(PLAIN, qk_norm_rotary=exhausted)
    fresh.engine.settings["none"] = Settings(Execution(kernels=operations))
    with pytest.raises(OutOfMemory, match="load with memory='auto'"):
        fresh.txt2img("a fox", image_size=SMALL, num_inference_steps=1)
    assert fresh.engine.settings["none"].execution.kernels is operations


# Of torch.compile's own modules.
COMPILING = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


@COMPILING
def test_torch_compile_makes_an_operation_for_any_number_of_rows() -> None:
    compiled = kernels.compiled_kernels().norm_modulate
    for rows in (5, 9):
        x, vectors = torch.randn(rows, 32), torch.randn(2, 2, 32).unbind(1)
        wanted = PLAIN.norm_modulate(x, *vectors, text_rows=2)
        torch.testing.assert_close(compiled(x, *vectors, text_rows=2), wanted)


def test_what_torch_compile_cannot_make_runs_in_plain_torch(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kernels, "compiled_kernels", lambda: dataclasses.replace(PLAIN, gelu=broken)
    )
    model = krea_local.load(tiny_folder, device="cpu", dtype="float32", compile=True)
    assert model.engine.settings["none"] == Settings()
    with pytest.warns(KreaWarning, match="instead of torch.compile's kernels, slower: PassMan"):
        model.txt2img("a fox", image_size=SMALL, num_inference_steps=1)


@COMPILING
@pytest.mark.skipif("KREA_LOCAL_SLOW" not in os.environ, reason="KREA_LOCAL_SLOW=1: 90 s")
def test_torch_compile_makes_the_same_operations_for_every_size(
    tiny_folder: Path, krea: Krea
) -> None:
    compiled = krea_local.load(tiny_folder, device="cpu", dtype="float32", compile=True)
    assert compiled.engine.settings["none"].execution.kernels.name == "compiled"
    for width, height in ((64, 96), (128, 64)):
        request = Txt2ImgRequest.parse({"prompt": "a fox", "num_inference_steps": 3})
        request = krea._with_own_defaults(request)
        found, wanted = (
            model.latents(request, seeds=[1, 2], width=width, height=height)
            for model in (compiled, krea)
        )
        assert distance(found, wanted) < 1e-5
