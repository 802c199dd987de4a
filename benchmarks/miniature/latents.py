"""Scenes and their latents, in a few sizes.

The autoencoder's latents are first made even: channel by channel, mean 0 and deviation 1, by
scaling the layers on both sides of them. That changes pictures at their borders alone, where zeros
now stand for the mean, until the decoder is polished.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.miniature import models, scenes, state

# Width and height: how many pictures, and how many more of three things, which are the hardest.
SIZES = {
    (512, 512): (4800, 1200),
    (768, 768): (400, 200),
    (1024, 576): (1200, 400),
    (576, 1024): (1200, 400),
    (1024, 768): (1600, 600),
    (768, 1024): (1600, 600),
    (1024, 1024): (800, 200),
}
CHUNK = 100

Pictures = dict[tuple[int, int], tuple[list[scenes.Scene], Tensor]]


def make(folder: Path, weights: Path) -> Pictures:
    """Render and encode, or read what an earlier run did.

    Returns:
        Width and height → scenes, and their latents [N, 16, h, w].
    """
    if not even(folder).exists():
        vae = _load(weights)
        make_even(vae)
        state.save(even(folder), vae.state_dict(), {})
    tasks = [
        _Task(folder, *size, things, first // CHUNK, min(CHUNK, count - first))
        for size, counts in SIZES.items()
        for things, count in zip((None, 3), counts, strict=True)
        for first in range(0, count, CHUNK)
    ]
    (folder / "latents").mkdir(exist_ok=True)
    missing = [task for task in tasks if not task.path.exists()]
    workers = torch.get_num_threads()
    # Not forked: a fork of a process with OpenMP's threads hangs.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, path in enumerate(pool.map(_encode_chunk, missing), 1):
            if number % 10 == 0:
                print(
                    f"latents {number} of {len(missing)}: {path.name}", file=sys.stderr, flush=True
                )
    found: Pictures = {}
    for task in tasks:
        tensors, notes = state.read(task.path)
        known, latents = found.get(task.size, ([], torch.empty(0)))
        known = known + [_scene(one) for one in notes["scenes"]]
        found[task.size] = (known, torch.cat([latents, tensors["latents"].float()]))
    return found


def even(folder: Path) -> Path:
    """Where the autoencoder's weights lie once its latents are even."""
    return folder / "vae.even.safetensors"


@dataclass(frozen=True)
class _Task:
    """Some pictures of one size; of so many things, or any number."""

    folder: Path
    width: int
    height: int
    things: int | None
    index: int
    count: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def kind(self) -> str:
        return f"{self.width}x{self.height}" + (f"-of-{self.things}" if self.things else "")

    @property
    def path(self) -> Path:
        return self.folder / "latents" / f"{self.kind}-{self.index:03d}.safetensors"


def _encode_chunk(task: _Task) -> Path:
    torch.set_num_threads(1)
    vae = _load(even(task.folder))
    random = Random(f"latents {task.kind} {task.index}")
    chosen = [scenes.trained(random, task.things) for _ in range(task.count)]
    latents = torch.cat([encode(vae, scenes.render(scene, *task.size)) for scene in chosen])
    notes = {"scenes": [asdict(scene) for scene in chosen]}
    state.save(task.path, {"latents": latents.half()}, notes)
    return task.path


def _scene(fields: dict[str, Any]) -> scenes.Scene:
    fields["things"] = tuple(scenes.Thing(**thing) for thing in fields["things"])
    fields["ground_colours"] = tuple(fields["ground_colours"])
    return scenes.Scene(**fields)


def _load(weights: Path) -> AutoencoderKL:
    vae = models.autoencoder()
    vae.load_state_dict(state.read(weights)[0])
    return vae.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(vae: AutoencoderKL, picture: scenes.Pixels) -> Tensor:
    """The means of the posterior, [1, 16, h, w]."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        moments: Tensor = vae.encoder(pixels)
    return moments.float()[:, : models.LATENT_CHANNELS]


@torch.no_grad()
def make_even(vae: AutoencoderKL, pictures: int = 60) -> None:
    """Scale and shift each channel of the latents to mean 0 and deviation 1."""
    random = Random("even")
    values = torch.cat(
        [
            encode(vae, scenes.render(scenes.sample(random), 512, 512))[0].flatten(1)
            for _ in range(pictures)
        ],
        dim=1,
    )
    mean, deviation = values.mean(1), values.std(1)
    count = models.LATENT_CHANNELS
    to_latents, from_latents = vae.encoder.conv_out, vae.decoder.conv_in
    to_latents.weight[:count] /= deviation[:, None, None, None]
    to_latents.bias[:count] = (to_latents.bias[:count] - mean) / deviation
    to_latents.bias[count:] -= 2 * deviation.log()
    # Means are added by a bias that knows no borders; padding with zeros now stands for the mean.
    from_latents.bias += from_latents.weight.sum((2, 3)) @ mean
    from_latents.weight *= deviation[None, :, None, None]
