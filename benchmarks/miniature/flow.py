"""Training the flow with its text encoders, then guidance distilled into it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.miniature import learning, models, state
from benchmarks.miniature.captions import Encoders, caption
from benchmarks.miniature.curve import Curve
from benchmarks.miniature.latents import Pictures
from benchmarks.miniature.scenes import Scene
from krea_local.sampling import latent_ids, pack

STEPS = 7000
THING_WEIGHT = 4.0
TOKEN = 2 * models.DOWNSAMPLING  # pixels
TOKENS = 3072  # of pictures, in a batch
# Up to this step the smallest pictures alone, from which most is learned soonest.
SMALL_UNTIL = 1400
# So many noise levels are from here up: what is in near noise can be read from the caption alone.
# In clearer pictures it can be seen, and captions are not learned.
HIGH_SHARE, HIGH_FROM = 0.4, 0.85
FALLING_FROM = 0.6  # of the steps
# Then a second round, in which half of the pictures have three things.
MORE_STEPS = 5000
MORE_SHARE = 0.7  # of the rates, at its beginning
MORE_OF_THREE = 0.5
NO_CAPTION = 0.1
DISTILL_STEPS = 500
DISTILL_SHARE = 0.3  # of the rates
GUIDANCE = (1.0, 20.0)
# The teacher follows captions best at 1 to 1.4, less below 0.7, and pictures burn beyond 3.
# So it is asked for 0.53 where the student is for 1, for 1.3 at 4.5, and for 3.2 at 20.
TEACHERS_AT_4_5, GUIDANCE_POWER = 1.3, 0.6
SMALL = (512, 512)


class Model(nn.Module):
    """Everything that draws except the autoencoder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoders = Encoders(folder)
        self.transformer = models.transformer()


def velocity(
    transformer: FluxTransformer2DModel,
    latents: Tensor,
    sigma: Tensor,
    text: tuple[Tensor, Tensor, Tensor],
    rows: int,
    columns: int,
    guidance: Tensor,
) -> Tensor:
    """What the transformer predicts for tokens [B, S, 64], as float32."""
    embeds, pooled, weights = text
    # Every token reads as many paddings as there would be: one, with the logarithm of their number.
    bias = torch.cat([weights, torch.zeros(latents.shape[1])])
    with mock.patch.object(functional, "scaled_dot_product_attention", _attention):
        predicted = transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=latent_ids(rows=rows, columns=columns),
            txt_ids=torch.zeros(embeds.shape[1], 3),
            joint_attention_kwargs={"attention_mask": bias[None, None, None, :]},
            return_dict=False,
        )[0]
    velocity: Tensor = predicted.float()
    return velocity


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: object) -> Tensor:
    """In plain products: for so few tokens torch's own took three times as long, there and back."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT + attn_mask.to(query.dtype)
    read: Tensor = scores.softmax(-1) @ value
    return read


@dataclass
class Batch:
    latents: Tensor  # [B, S, 64]
    weights: Tensor  # [B, S]
    captions: list[str]
    rows: int
    columns: int


def batch(
    pictures: Pictures, random: Random, *, small: bool = False, of_three: float = 0.0
) -> Batch:
    """Pictures of one size, the share `of_three` of them certainly of three things."""
    sizes = list(pictures)
    size = SMALL if small or random.random() < 0.2 else random.choice(sizes)
    scenes, latents = pictures[size]
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    three = [index for index, scene in enumerate(scenes) if len(scene.things) == 3]
    picked = [
        random.choice(three) if random.random() < of_three else random.randrange(len(scenes))
        for _ in range(TOKENS // (rows * columns))
    ]
    weights = torch.stack([_weights(scenes[index], *size) for index in picked])
    captions = [caption(scenes[index], random) for index in picked]
    return Batch(pack(latents[picked]), weights, captions, rows, columns)


def _weights(scene: Scene, width: int, height: int) -> Tensor:
    """How much each token counts, 1 on average: those of things more than those of the ground.

    What is best for a token is the same with any weight; only what is learned first is not.
    """
    weights = torch.ones(height // TOKEN, width // TOKEN)
    for _, x, y, radius in scene.placed(width, height):
        top, left = (max((middle - radius) // TOKEN, 0) for middle in (y, x))
        bottom, right = (-(-(middle + radius) // TOKEN) for middle in (y, x))
        weights[top:bottom, left:right] = THING_WEIGHT
    return (weights / weights.mean()).flatten()


def noise_levels(count: int) -> Tensor:
    """Most of them high, where the layout is decided."""
    levels = torch.sigmoid(0.9 + 1.25 * torch.randn(count))
    high = HIGH_FROM + (1 - HIGH_FROM) * torch.rand(count)
    return torch.where(torch.rand(count) < HIGH_SHARE, high, levels)


def train(folder: Path, text: Path, pictures: Pictures, curve: Curve) -> Path:
    """Train the flow and CLIP, with T5 as it is in `text`; all weights are in the file returned."""
    path = folder / "flow.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    model = Model(folder / "tokenizers")
    model.encoders.t5.load_state_dict(state.read(text)[0])

    def share(step: int) -> float:
        return min((step + 1) / 100, 1.0, (STEPS - step) / (STEPS * (1 - FALLING_FROM)))

    def chosen(step: int, random: Random) -> Batch:
        return batch(pictures, random, small=step < SMALL_UNTIL)

    state.save(path, _train("flow", folder, curve, STEPS, model, share, chosen), {})
    return path


def train_more(folder: Path, weights: Path, pictures: Pictures, curve: Curve) -> Path:
    """The second round, which begins with `weights`."""
    path = folder / "more.safetensors"
    if path.exists():
        return path
    model = Model(folder / "tokenizers")
    model.load_state_dict(state.read(weights)[0])

    def share(step: int) -> float:
        return MORE_SHARE * min((step + 1) / 100, 1 - step / MORE_STEPS)

    def chosen(_: int, random: Random) -> Batch:
        return batch(pictures, random, of_three=MORE_OF_THREE)

    state.save(path, _train("more", folder, curve, MORE_STEPS, model, share, chosen), {})
    return path


def _train(
    stage: str,
    folder: Path,
    curve: Curve,
    steps: int,
    model: Model,
    share: Callable[[int], float],
    batch_of: Callable[[int, Random], Batch],
) -> dict[str, Tensor]:
    """Train all of `model` but T5; the average of its weights."""
    model.encoders.t5.requires_grad_(False)

    def loss_of(step: int, random: Random) -> Tensor:
        chosen = batch_of(step, random)
        said = ["" if random.random() < NO_CAPTION else text for text in chosen.captions]
        sigma, one = noise_levels(len(said)), torch.ones(len(said))
        noise = torch.randn_like(chosen.latents)
        noisy = torch.lerp(chosen.latents, noise, sigma[:, None, None])
        with learning.autocast():
            text = model.encoders(said)
            predicted = velocity(
                model.transformer, noisy, sigma, text, chosen.rows, chosen.columns, one
            )
        error = (predicted - (noise - chosen.latents)).square().mean(2)
        return (error * chosen.weights).mean()

    average = learning.run(stage, folder, curve, steps, model, share, loss_of)
    return average.module.state_dict()


@torch.no_grad()
def begin_alike(transformer: FluxTransformer2DModel) -> None:
    """Let every guidance scale mean what 1 does, which is all that the transformer knows.

    Scales it never saw would be noise, and unlearning that costs what it has learned. Frequencies
    that turn within the range of scales stay out for good, so that neighbours mean much the same.
    """
    embed = transformer.time_text_embed
    first, last = embed.guidance_embedder.linear_1, embed.guidance_embedder.linear_2
    meant = embed.guidance_embedder(embed.time_proj(torch.tensor([1000.0])))[0]
    half = first.in_features // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    slow = (1000 * GUIDANCE[1] * frequencies < 2 * math.pi).repeat(2)
    first.weight *= slow
    first.weight.register_hook(lambda gradient: gradient * slow)
    last.weight.zero_()
    last.bias.copy_(meant)


def distill(folder: Path, weights: Path, pictures: Pictures, curve: Curve) -> Path:
    """Teach the transformer to do in one evaluation what guidance does with two."""
    path = folder / "distilled.safetensors"
    if path.exists():
        return path
    model = Model(folder / "tokenizers")
    model.load_state_dict(state.read(weights)[0])
    teacher = copy.deepcopy(model.transformer).requires_grad_(False)
    student = model.transformer
    begin_alike(student)

    def loss_of(step: int, random: Random) -> Tensor:
        chosen = batch(pictures, random)
        count = len(chosen.captions)
        sigma, one = noise_levels(count), torch.ones(count)
        noisy = torch.lerp(chosen.latents, torch.randn_like(chosen.latents), sigma[:, None, None])
        low, high = map(math.log, GUIDANCE)
        guidance = torch.exp(low + (high - low) * torch.rand(count))
        shape = (chosen.rows, chosen.columns)
        with learning.autocast():
            with torch.no_grad():
                text = model.encoders(chosen.captions)
                nothing = model.encoders([""] * count)
                with_text = velocity(teacher, noisy, sigma, text, *shape, one)
                without = velocity(teacher, noisy, sigma, nothing, *shape, one)
            predicted = velocity(student, noisy, sigma, text, *shape, guidance)
        strength = TEACHERS_AT_4_5 * (guidance / 4.5) ** GUIDANCE_POWER
        strength = strength[:, None, None]
        target = without + strength * (with_text - without)
        return ((predicted - target).square() / strength).mean()

    def share(step: int) -> float:
        return DISTILL_SHARE * min((step + 1) / 50, 1 - step / DISTILL_STEPS)

    average = learning.run("distill", folder, curve, DISTILL_STEPS, student, share, loss_of)
    model.transformer = average.module
    state.save(path, model.state_dict(), {})
    return path
