"""What only a CUDA GPU can show; everything else is tested on the CPU."""

from __future__ import annotations

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
    before = torch.cuda.memory_allocated()
    drawn = offloaded.txt2img("a fox", **arguments)
    cached_prompt = 2 * 512 * 32 * 2
    assert torch.cuda.memory_allocated() - before <= cached_prompt + 2**16
    resident = on_gpu.txt2img("a fox", **arguments)
    assert drawn.images[0].tobytes() == resident.images[0].tobytes()


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
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((total - free + 2**20) / total)
    try:
        with pytest.raises(krea_local.OutOfMemory, match="offload='model'"):
            on_gpu.txt2img("a fox", image_size={"width": 2048, "height": 2048}, seed=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert on_gpu.txt2img("a fox", **arguments).images[0].tobytes() == expected
