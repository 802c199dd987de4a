"""What only a CUDA GPU can show; everything else is tested on the CPU."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import krea_local
from benchmarks import random_model
from krea_local import kernels, reading
from krea_local.kernels import PLAIN, Quantized, distance, ggml
from krea_local.layers import check_product
from krea_local.memory import pin
from krea_local.packed import packed_layers
from krea_local.sampling import latent_ids
from krea_local.speed import LEVELS, Place, Settings, eight_bit_of, settings_of
from krea_local.transformer import Config, FluxTransformer

pytestmark = pytest.mark.gpu
SIZE = {"width": 256, "height": 256}


@pytest.fixture(scope="module")
def on_gpu(tiny_folder: Path) -> krea_local.Krea:
    return krea_local.load(tiny_folder)


def test_auto_is_cuda_in_bfloat16(on_gpu: krea_local.Krea) -> None:
    assert on_gpu.device.type == "cuda"
    assert on_gpu.dtype == torch.bfloat16
    assert {p.device.type for p in on_gpu.models.transformer.parameters()} == {"cuda"}


def test_the_same_seed_twice_is_bit_equal_and_batches_are_singles(
    on_gpu: krea_local.Krea,
) -> None:
    two = on_gpu.txt2img("a fox", image_size=SIZE, seed=5, num_images=2)
    for i in range(2):
        alone = on_gpu.txt2img("a fox", image_size=SIZE, seed=5 + i)
        assert alone.images[0].tobytes() == two.images[i].tobytes()


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_offloading_draws_the_same_picture_and_frees_the_gpu(
    on_gpu: krea_local.Krea, tiny_folder: Path, offload: str
) -> None:
    offloaded = krea_local.load(tiny_folder, offload=offload)
    arguments = {"image_size": SIZE, "seed": 5, "enable_safety_checker": False}
    drawn = offloaded.txt2img("a fox", **arguments)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    assert offloaded.txt2img("a fox", **arguments).images[0].tobytes() == drawn.images[0].tobytes()
    assert torch.cuda.memory_allocated() == before
    parts = (offloaded.models.transformer, offloaded.models.vae, offloaded.models.text_encoder_2)
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}
    resident = on_gpu.txt2img("a fox", **arguments)
    assert drawn.images[0].tobytes() == resident.images[0].tobytes()


def test_large_weights_are_locked_in_host_memory_while_they_live() -> None:
    layer = torch.nn.Linear(1024, 1024)
    pin([layer], torch.device("cuda", torch.cuda.current_device()))
    assert layer.weight.is_pinned()
    assert not layer.bias.is_pinned()  # too small to matter
    torch.testing.assert_close(layer.weight.to("cuda", non_blocking=True).cpu(), layer.weight)


def test_image_to_image_at_full_strength_is_text_to_image(on_gpu: krea_local.Krea) -> None:
    arguments = {"seed": 5, "num_inference_steps": 10}
    drawn = on_gpu.txt2img("a fox", image_size=SIZE, **arguments)
    redrawn = on_gpu.img2img("a fox", image_url=drawn.images[0], strength=1, **arguments)
    assert redrawn.images[0].tobytes() == drawn.images[0].tobytes()
    near = on_gpu.img2img("a fox", image_url=drawn.images[0], strength=0.1, **arguments)
    assert near.images[0].size == drawn.images[0].size


def test_another_thread_draws_on_the_same_gpu(on_gpu: krea_local.Krea) -> None:
    assert on_gpu.device.index is not None
    found: list[bytes] = []
    arguments = {"image_size": SIZE, "seed": 5}
    thread = threading.Thread(
        target=lambda: found.append(on_gpu.txt2img("a fox", **arguments).images[0].tobytes())
    )
    thread.start()
    thread.join()
    assert found == [on_gpu.txt2img("a fox", **arguments).images[0].tobytes()]


def test_the_denoising_loop_never_waits_for_the_gpu(on_gpu: krea_local.Krea) -> None:
    request = krea_local.Txt2ImgRequest.parse({"prompt": "a fox", "num_inference_steps": 4})
    with torch.inference_mode():
        on_gpu.latents(request, seeds=[1], width=256, height=256)  # kernels are loaded
        begun: list[int] = []

        def watch(step: int, latents: torch.Tensor) -> None:
            begun.append(step)
            torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")

        try:
            on_gpu.latents(request, seeds=[1], width=256, height=256, on_step=watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert begun == [1, 2, 3, 4]


@pytest.mark.parametrize("acceleration", ["none", "regular", "high"])
def test_every_level_runs_on_kernels_and_repeats_itself(
    on_gpu: krea_local.Krea, acceleration: str
) -> None:
    settings = on_gpu.prepare(acceleration)
    assert settings.execution.kernels.name == "triton"
    assert settings.execution.gelu_epilogue
    wanted = None if acceleration == "none" else eight_bit_of(on_gpu.device)
    assert settings.eight_bit == wanted
    for width, height in ((256, 256), (80, 208), (1024, 64)):
        arguments = {"image_size": {"width": width, "height": height}, "seed": 5}
        arguments |= {"num_inference_steps": 10, "acceleration": acceleration}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", krea_local.KreaWarning)
            drawn = on_gpu.txt2img("a fox", **arguments)
            again = on_gpu.txt2img("a fox", **arguments)
        assert drawn.images[0].tobytes() == again.images[0].tobytes()
        assert not any("failed" in notice for notice in drawn.notices)
    assert on_gpu.engine.settings[acceleration] == settings  # nothing fell back


def test_modulation_off_the_gpu_draws_the_same_picture_in_less_memory(
    on_gpu: krea_local.Krea, tiny_folder: Path
) -> None:
    other = krea_local.load(tiny_folder, offload="modulation")
    modulation = [p for layer in other.models.transformer.modulations() for p in layer.parameters()]
    assert {p.device.type for p in modulation} == {"cpu"}
    arguments = {"image_size": SIZE, "seed": 5}
    wanted = on_gpu.txt2img("a fox", **arguments).images[0].tobytes()
    assert other.txt2img("a fox", **arguments).images[0].tobytes() == wanted


@pytest.fixture(scope="module")
def wide() -> FluxTransformer:
    """Two blocks of FLUX.1 at its true width."""
    config = Config(num_layers=1, num_single_layers=1)
    with torch.device("cuda"):
        model = FluxTransformer(config).to(torch.bfloat16).eval().requires_grad_(False)
    random = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=random)
    return model


@pytest.mark.parametrize("tokens", [(32, 32), (7, 9), (64, 64)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_at_true_width_is_as_exact_as_plain_torch(
    wide: FluxTransformer, tokens: tuple[int, int], batch: int
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    random = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)

    rows, columns = tokens
    latents, prompt, pooled = draw(batch, rows * columns, 64), draw(1, 512, 4096), draw(1, 768)

    def velocity(settings: Settings, model: FluxTransformer, number: torch.dtype) -> torch.Tensor:
        conditioning = model.condition(
            prompt.to(number),
            pooled.to(number),
            timesteps=torch.tensor([0.5], device=device, dtype=number),
            guidance=torch.tensor([4.0], device=device),
            txt_ids=torch.zeros(512, 3, device=device),
            img_ids=latent_ids(rows=rows, columns=columns).to(device),
        )
        with torch.inference_mode():
            return model(latents.to(number), conditioning, 0, settings.execution).float()

    exact = velocity(Settings(), copy.deepcopy(wide).float(), torch.float32)
    plain = distance(velocity(Settings(), wide, torch.bfloat16), exact)
    place = Place(device, wide)
    fast, notices = settings_of(LEVELS["none"], place)
    assert notices == ()
    assert distance(velocity(fast, wide, torch.bfloat16), exact) < 1.1 * plain
    native = {eight_bit_of(device)} - {None}
    integers = {torch.int8} if torch.cuda.get_device_capability(device) >= (8, 0) else set()
    for eight_bit in native | integers:  # the latter work on newer GPUs too
        half = wide.in_eight_bit(eight_bit, fast.execution.kernels, device)
        allowed = {torch.float8_e4m3fn: 0.08, torch.int8: 0.04}[eight_bit]
        assert distance(velocity(fast, half, torch.bfloat16), exact) < allowed


def test_running_out_of_memory_is_explained_and_survived(tiny_folder: Path) -> None:
    model = krea_local.load(tiny_folder, offload="none")
    arguments = {"image_size": SIZE, "seed": 5, "num_inference_steps": 2}
    expected = model.txt2img("a fox", **arguments).images[0].tobytes()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # The limit is on what torch's allocator holds: what it has now, and 2 MiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(krea_local.OutOfMemory, match="load with memory='auto'"):
            model.txt2img("a fox", image_size={"width": 2048, "height": 2048}, seed=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.txt2img("a fox", **arguments).images[0].tobytes() == expected


@pytest.mark.parametrize("piece", [2**12, reading.PIECE])
@pytest.mark.parametrize("kept", list(reading.DTYPES.values()), ids=list(reading.DTYPES))
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_numbers_get_onto_the_gpu_bit_by_bit(
    kept: torch.dtype,
    wanted: torch.dtype,
    piece: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PIECE", piece)
    random = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (7,), (33, 31), (1024, 3000), (3, 5, 7)]
    save_file(
        {f"{i}": torch.randn(shape, generator=random).to(kept) for i, shape in enumerate(shapes)},
        tmp_path / "a.safetensors",
    )
    found = reading.numbers_of(tmp_path / "a.safetensors")
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(2):  # the second time into memory that a computation has just given back
        state = {
            name: torch.empty(one.shape, dtype=wanted, device=device) for name, one in found.items()
        }
        transfers = [reading.Transfer(found[name], state[name], "vae") for name in found]
        reading.read(transfers, lambda component, nbytes: None)
        copies = {name: tensor + 0 for name, tensor in state.items()}  # no wait in between
        for name, theirs in load_file(tmp_path / "a.safetensors").items():
            assert torch.equal(copies[name].cpu(), theirs.to(wanted)), name
        del state, copies
        torch.ones(1024, 3000, device=device).mul_(2)


def test_loading_leaves_only_the_weights_and_no_threads(tiny_folder: Path) -> None:
    from krea_local import loading, weights

    def load() -> int:
        before = torch.cuda.memory_allocated()
        device = torch.device("cuda", torch.cuda.current_device())
        models = loading.load_models(weights.find(tiny_folder), dtype=torch.bfloat16, device=device)
        parts = (models.transformer, models.vae, models.text_encoder, models.text_encoder_2)
        tensors = {
            id(t): t for part in parts for t in (*part.parameters(), *part.buffers())
        }.values()
        assert {tensor.device for tensor in tensors} == {device}
        rounded = sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)
        assert torch.cuda.memory_allocated() - before == rounded
        return threading.active_count()

    assert load() == load()


def test_any_number_of_blocks_may_stay(on_gpu: krea_local.Krea, tiny_folder: Path) -> None:
    from krea_local import loading, weights
    from krea_local.plan import Plan, options

    arguments = {"image_size": SIZE, "seed": 5}
    wanted = on_gpu.txt2img("a fox", **arguments).images[0].tobytes()
    sizes = loading.sizes(weights.find(tiny_folder), torch.bfloat16)
    for plan in options(Plan(sizes)):
        made = krea_local.load(tiny_folder, memory=f"{plan.peak}B")
        assert made.plan is not None
        assert made.plan.peak <= plan.peak
        drawn = made.txt2img("a fox", **arguments).images[0].tobytes()
        # Strips round otherwise: in bfloat16 by some of 255 levels.
        assert all(abs(a - b) <= 4 * made.plan.strips for a, b in zip(drawn, wanted, strict=True))


def test_loras_draw_the_same_in_every_plan_and_leave_no_trace(
    on_gpu: krea_local.Krea, tiny_folder: Path, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in on_gpu.models.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            for half, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
                tensors[f"{name}.lora_{half}.weight"] = torch.randn(shape, generator=random)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    arguments = {"image_size": SIZE, "seed": 5}
    plain = on_gpu.txt2img("a fox", **arguments).images[0].tobytes()
    changed = on_gpu.txt2img("a fox", **arguments, loras=[file]).images[0].tobytes()
    assert changed != plain
    assert on_gpu.txt2img("a fox", **arguments).images[0].tobytes() == plain
    for offload in ("model", "blocks"):
        made = krea_local.load(tiny_folder, offload=offload)
        assert made.txt2img("a fox", **arguments, loras=[file]).images[0].tobytes() == changed
    if eight_bit_of(on_gpu.device) is not None:
        levels = [
            on_gpu.txt2img("a fox", **arguments, acceleration="regular", loras=loras)
            for loras in ((), [file], ())
        ]
        first, second, third = (level.images[0].tobytes() for level in levels)
        assert first == third != second


@pytest.mark.parametrize(("inner", "outputs"), [(3072, 9216), (3072, 3072), (15360, 3072)])
@pytest.mark.parametrize("rows", [1, 17, 512, 1537, 4096])
def test_products_of_integers_are_exact(rows: int, inner: int, outputs: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs compute capability 8.0")
    ours = kernels.triton_kernels()
    check_product(torch.int8, ours, device, torch.bfloat16)
    random = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=random)

    # Scales of 1 and no bias: what is written is the sum, rounded once to float32.
    x = Quantized(draw(rows + 3, inner)[3:], torch.ones(rows, 1, device=device))
    weight = Quantized(draw(outputs, inner), torch.ones(outputs, 1, device=device))
    bias = torch.zeros(outputs, device=device)
    wide = torch.full((rows, outputs + 16), torch.nan, device=device)
    ours.int8_product(x, weight, bias, out=wide[:, :outputs])
    wanted = (x.values.double() @ weight.values.double().t()).float()
    assert torch.equal(wide[:, :outputs], wanted)
    assert wide[:, outputs:].isnan().all()
    assert torch.equal(PLAIN.int8_product(x, weight, bias), wanted)


@pytest.mark.parametrize("kind", ["float8", *ggml.KINDS])
def test_a_large_packed_weight_is_widened_as_plain_torch_does(kind: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    random = torch.Generator(device).manual_seed(0)
    shape = (21504, 3072)  # the largest there is
    packing = random_model.packing(kind, shape)
    parts = {
        name: random_model.random_part(packing, name, device, random) for name in packing.shapes
    }
    ours, wanted = (
        ops.widen(kind, parts, torch.empty(shape, dtype=torch.bfloat16, device=device))
        for ops in (kernels.triton_kernels(), PLAIN)
    )
    assert torch.equal(ours, wanted)
    assert 1e-3 < float(wanted.float().std()) < 0.2


@pytest.mark.parametrize("keep", ["as_float8", "as_scaled_fp8", "as_rows", "as_nf4"])
@pytest.mark.parametrize("offload", ["none", "modulation", "model", "blocks"])
def test_packed_weights_draw_what_wide_ones_do(
    keep: str, offload: str, on_gpu: krea_local.Krea, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")  # which what writes such files imports
    import kept

    state = on_gpu.models.transformer.state_dict()
    stored, _ = getattr(kept, keep)({name: tensor.cpu() for name, tensor in state.items()})
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "x.safetensors")
    pictures = []
    for packed in (True, False):
        made = krea_local.load(
            tiny_folder, transformer=tmp_path / "x.safetensors", offload=offload, packed=packed
        )
        levels = ("none", "regular", "none") if eight_bit_of(made.device) else ("none",)
        drawn = [
            made.txt2img("a fox", image_size=SIZE, seed=5, acceleration=level).images[0].tobytes()
            for level in levels
        ]
        assert drawn[0] == drawn[-1]
        pictures.append(drawn)
        layers = packed_layers(made.models.transformer)
        assert bool(layers) == packed
        # In use, and so right by its own check at load.
        assert all(layer.kernels.widen is not PLAIN.widen for layer in layers)
    assert pictures[0] == pictures[1]
