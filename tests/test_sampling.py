from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krea_local import sampling

TOKENS_OF_SIZES = {"512²": 1024, "1024x768": 3072, "1024²": 4096, "2048²": 16384}


@pytest.mark.parametrize("image_seq_len", TOKENS_OF_SIZES.values(), ids=list(TOKENS_OF_SIZES))
def test_sigmas_equal_diffusers_scheduler_bit_for_bit(
    tiny_folder: Path, image_seq_len: int
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_folder / "scheduler")
    for steps in range(1, 51):
        uniform = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=uniform, mu=calculate_shift(image_seq_len))
        sigmas = sampling.flow_sigmas(steps, image_seq_len)
        assert torch.equal(sigmas, scheduler.sigmas)
        assert sigmas.dtype == torch.float32
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        assert bool((sigmas.diff() < 0).all())


def test_the_shift_is_not_clamped_at_four_megapixels() -> None:
    assert sampling.Shift().mu(256) == pytest.approx(0.5)
    assert sampling.Shift().mu(4096) == pytest.approx(1.15)
    assert sampling.Shift().mu(16384) == pytest.approx(3.23, abs=0.001)
    last_of_28 = sampling.flow_sigmas(28, 16384)[-2]
    assert float(last_of_28) == pytest.approx(0.48, abs=0.01)


def test_strength_gives_exactly_the_ceiling_of_its_share_of_steps() -> None:
    assert sampling.steps_to_run(50, 0.56) == 28  # 28.000000000000004 in floats
    assert sampling.steps_to_run(40, 0.95) == 38
    assert sampling.steps_to_run(10, 0.01) == 1
    assert sampling.steps_to_run(28, 1.0) == 28
    assert sampling.steps_to_run(28, 1) == 28


@given(st.integers(10, 50), st.integers(1, 100))
def test_the_steps_of_any_strength_are_exact(steps: int, hundredths: int) -> None:
    exact = -(-steps * hundredths // 100)
    assert sampling.steps_to_run(steps, hundredths / 100) == exact
    assert 1 <= exact <= steps


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_unpack_undoes_pack(rows: int, columns: int, batch: int) -> None:
    latent_map = torch.randn(batch, 16, 2 * rows, 2 * columns)
    latents = sampling.pack(latent_map)
    assert latents.shape == (batch, rows * columns, 64)
    assert torch.equal(sampling.unpack(latents, rows=rows, columns=columns), latent_map)


def test_packing_and_positions_equal_diffusers() -> None:
    from diffusers import FluxPipeline

    latent_map = torch.randn(2, 16, 6, 10)
    assert torch.equal(
        sampling.pack(latent_map), FluxPipeline._pack_latents(latent_map, 2, 16, 6, 10)
    )
    assert torch.equal(
        sampling.latent_ids(rows=3, columns=5),
        FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32),
    )


def test_positions_stay_exact_where_bfloat16_would_not() -> None:
    ids = sampling.latent_ids(rows=1, columns=884)  # the widest picture: 14144 pixels
    assert torch.equal(ids[:, 2], torch.arange(884.0))
    assert not torch.equal(ids[:, 2].bfloat16().float(), ids[:, 2])


def test_noise_is_drawn_per_image_and_seed_zero_is_a_seed() -> None:
    three = sampling.draw_noise([0, 1, 2], (16, 4, 4), torch.float32)
    for i in range(3):
        alone = sampling.draw_noise([i], (16, 4, 4), torch.float32)
        assert torch.equal(three[i : i + 1], alone)
    assert not torch.equal(three[0], three[1])


@pytest.mark.parametrize("seed", [-1, 2**64, 2**100 + 5, -(2**70)])
def test_seeds_of_any_size_and_sign_draw_noise(seed: int) -> None:
    noise = sampling.draw_noise([seed], (16, 4, 4), torch.float32)
    assert torch.equal(noise, sampling.draw_noise([seed % 2**64], (16, 4, 4), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_noise_is_exactly_the_noise_and_none_exactly_the_image(dtype: torch.dtype) -> None:
    clean, noise = torch.randn(2, 1, 16, 4, 4).to(dtype).unbind()
    assert torch.equal(sampling.add_noise(clean, noise, 1.0), noise)
    assert torch.equal(sampling.add_noise(clean, noise, 0.0), clean)
    assert sampling.add_noise(clean, noise, torch.tensor(0.5)).dtype == dtype


def test_denoise_follows_a_constant_velocity_to_the_clean_image() -> None:
    # On the straight path x = (1 - s) clean + s noise the velocity is noise - clean everywhere, and
    # with sigmas that are powers of two every sum is exact.
    clean = torch.tensor([[[1.0, -2.0, 3.0]]])
    noise = torch.tensor([[[5.0, 0.5, -1.0]]])
    seen: list[float] = []

    def velocity(latents: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(step)
        return noise - clean

    steps: list[int] = []
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    latents = sampling.denoise(velocity, noise, sigmas, lambda step, _: steps.append(step))
    assert torch.equal(latents, clean)
    assert seen == [0, 1, 2]
    assert steps == [1, 2, 3]


def test_denoise_integrates_an_exponential() -> None:
    # dx/dsigma = x has the solution x(0) = x(1) / e; Euler's error falls with the step.
    def error(steps: int) -> float:
        sigmas = torch.linspace(1, 0, steps + 1)
        end = sampling.denoise(lambda latents, _: latents, torch.ones(1, 1, 1), sigmas)
        return abs(float(end) - math.exp(-1))

    assert error(1000) < error(100) / 9 < error(10) / 80


def test_denoise_keeps_the_dtype_and_what_on_step_raises_ends_it() -> None:
    def stop(step: int, latents: torch.Tensor) -> None:
        raise KeyError(step)

    latents = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    sigmas = sampling.flow_sigmas(4, 256)
    assert sampling.denoise(lambda x, _: x, latents, sigmas).dtype == torch.bfloat16
    with pytest.raises(KeyError, match="1"):
        sampling.denoise(lambda x, _: x, latents, sigmas, stop)
