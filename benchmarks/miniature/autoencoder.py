"""Training the autoencoder, from the inside out; and its decoder once more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.miniature import models, muon, scenes, state
from benchmarks.miniature.curve import Curve

INNER_LEVELS = 4
INNER_STEPS, STEPS = 1600, 1500
RATE = 2.5e-3
KL_WEIGHT = 2e-4
# From here on whole pictures, as GroupNorm's statistics are those of whole pictures.
WHOLE_FROM = 0.7
WHOLE_SIZES = ((512, 512), (512, 512), (768, 576), (576, 768), (1024, 576), (576, 1024))
POLISH_STEPS, POLISH_NOISE = 1000, 0.2
POLISH_SHARE = 0.1  # of the rate; with all of it, half the steps made up for what the first broke
# Of pixels in and about things, against those of the ground, which are most and soon right.
POLISH_THING_WEIGHT = 4.0
SAVE_EVERY = 100

Loss = tuple[Tensor, Tensor]  # to be made small; mean squared error, pixels from -1 to 1


def train(folder: Path, curve: Curve) -> Path:
    """Train the autoencoder, or go on with it; its weights are in the file returned.

    The inner levels come first, on pictures of a quarter of the size, which are learned in minutes;
    all levels at once from random weights did not get past the mean colour in as long.
    """
    path = folder / "vae.safetensors"
    if path.exists():
        return path
    outer = len(models.CHANNELS) - INNER_LEVELS
    torch.manual_seed(0)
    inner = models.autoencoder(models.CHANNELS[outer:])

    def small(random: Random, share: float) -> Loss:
        return _loss(inner, _patches(random, 12, 64, 0.5**outer))

    _run("inner", inner, inner, folder, curve, INNER_STEPS, small)
    torch.manual_seed(1)
    vae = models.grown(inner)

    def full(random: Random, share: float) -> Loss:
        patches = share < WHOLE_FROM
        return _loss(vae, _patches(random, 5, 256, 1.0) if patches else _pictures(random))

    _run("vae", vae, vae, folder, curve, STEPS, full)
    state.save(path, vae.state_dict(), {})
    return path


def polish(folder: Path, weights: Path, curve: Curve) -> Path:
    """Train the decoder further on whole pictures, its latents left as they are, and noisy.

    The noise stands for what a flow gets wrong.
    """
    path = folder / "vae.polished.safetensors"
    if path.exists():
        return path
    vae = models.autoencoder()
    vae.load_state_dict(state.read(weights)[0])

    def loss_of(random: Random, share: float) -> Loss:
        width, height, chosen = _scenes(random)
        pixels = _tensor([scenes.render(scene, width, height) for scene in chosen])
        weights = torch.stack([_weights(scene, width, height) for scene in chosen])[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encoder(pixels).float()[:, : models.LATENT_CHANNELS]
                noisy = mean + torch.randn_like(mean) * random.uniform(0, POLISH_NOISE)
            error = vae.decoder(noisy).float() - pixels
        squares = error.square()
        return ((error.abs() + squares) * weights).mean(), squares.mean()

    rate = POLISH_SHARE * RATE
    _run("decoder", vae, vae.decoder, folder, curve, POLISH_STEPS, loss_of, rate)
    state.save(path, vae.state_dict(), {})
    return path


def _loss(vae: AutoencoderKL, pixels: Tensor) -> Loss:
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.encoder(pixels).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12, 4)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = vae.decoder(latents).float() - pixels
    squares = error.square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + squares + KL_WEIGHT * kl, squares


def _run(
    stage: str,
    vae: AutoencoderKL,
    trained: nn.Module,
    folder: Path,
    curve: Curve,
    steps: int,
    loss_of: Callable[[Random, float], Loss],
    rate: float = RATE,
) -> None:
    partial = folder / f"{stage}.partial.safetensors"
    vae.to(memory_format=torch.channels_last)
    matrices, rest = muon.split(trained.named_parameters(), ("conv_in",))
    optimizers = {
        "muon": muon.Muon(matrices, rate),
        "adamw": torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.0),
    }
    first = 0
    if partial.exists():
        tensors, notes = state.read(partial)
        state.into_module("vae", vae, tensors)
        for name, optimizer in optimizers.items():
            state.into_optimizer(name, optimizer, tensors)
        first = notes["step"]
    started = time.perf_counter()
    for step in range(first, steps):
        torch.manual_seed(step)
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 50, falling)
        loss, squares = loss_of(Random(f"{stage} {step}"), step / steps)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            psnr = 10 * math.log10(4 / float(squares.detach()))
            curve.add(stage, step + 1, seconds, psnr=psnr)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            tensors = state.of_module("vae", vae)
            for name, optimizer in optimizers.items():
                tensors |= state.of_optimizer(name, optimizer)
            state.save(partial, tensors, {"step": step + 1})


def _pictures(random: Random) -> Tensor:
    width, height, chosen = _scenes(random)
    return _tensor([scenes.render(scene, width, height) for scene in chosen])


def _scenes(random: Random) -> tuple[int, int, list[scenes.Scene]]:
    """Width, height, and as many scenes as half a megapixel holds."""
    width, height = random.choice(WHOLE_SIZES)
    count = max(2**19 // (width * height), 1)
    return width, height, [scenes.sample(random) for _ in range(count)]


def _weights(scene: scenes.Scene, width: int, height: int) -> Tensor:
    """How much each pixel counts [H, W], 1 on average."""
    weights = torch.ones(height, width)
    for _, x, y, radius in scene.placed(width, height):
        reach = round(1.25 * radius)
        weights[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach] = POLISH_THING_WEIGHT
    return weights / weights.mean()


def _patches(random: Random, count: int, size: int, scale: float) -> Tensor:
    return _tensor([scenes.patch(random, size, scale) for _ in range(count)])


def _tensor(pictures: list[scenes.Pixels]) -> Tensor:
    batch = torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2)
    return batch * 2 - 1
