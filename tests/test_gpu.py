"""What only a CUDA GPU can show; everything else is tested on the CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import krea_local

pytestmark = pytest.mark.gpu
SIZE = {"width": 256, "height": 256}


@pytest.fixture(scope="module")
def on_gpu(tiny_folder: Path) -> krea_local.Krea:
    return krea_local.load(tiny_folder)


def test_auto_is_cuda_in_bfloat16(on_gpu: krea_local.Krea) -> None:
    assert on_gpu.device.type == "cuda"
    assert on_gpu.dtype == torch.bfloat16
    assert on_gpu.models.transformer.device.type == "cuda"


def test_the_same_seed_twice_is_bit_equal_and_batches_are_singles(
    on_gpu: krea_local.Krea,
) -> None:
    two = on_gpu.txt2img("a fox", image_size=SIZE, seed=5, num_images=2)
    for i in range(2):
        alone = on_gpu.txt2img("a fox", image_size=SIZE, seed=5 + i)
        assert alone.images[0].tobytes() == two.images[i].tobytes()


def test_offloading_draws_the_same_picture_and_frees_the_gpu(
    on_gpu: krea_local.Krea, tiny_folder: Path
) -> None:
    offloaded = krea_local.load(tiny_folder, offload="model")
    arguments = {"image_size": SIZE, "seed": 5, "enable_safety_checker": False}
    drawn = offloaded.txt2img("a fox", **arguments)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    assert offloaded.txt2img("a fox", **arguments).images[0].tobytes() == drawn.images[0].tobytes()
    assert torch.cuda.memory_allocated() == before
    parts = (offloaded.models.transformer, offloaded.models.vae, offloaded.models.text_encoder_2)
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}
    resident = on_gpu.txt2img("a fox", **arguments)
    assert drawn.images[0].tobytes() == resident.images[0].tobytes()


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


def test_running_out_of_memory_is_explained_and_survived(on_gpu: krea_local.Krea) -> None:
    arguments = {"image_size": SIZE, "seed": 5, "num_inference_steps": 2}
    expected = on_gpu.txt2img("a fox", **arguments).images[0].tobytes()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # The limit is on what torch's allocator holds: what it has now, and 2 MiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(krea_local.OutOfMemory, match="offload='model'"):
            on_gpu.txt2img("a fox", image_size={"width": 2048, "height": 2048}, seed=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert on_gpu.txt2img("a fox", **arguments).images[0].tobytes() == expected
