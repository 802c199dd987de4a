"""Teaching T5 alone what captions say, before pictures are learned.

From pictures it is learned slowly which colour belongs to which shape, and which thing lies where:
after an hour all colours and shapes of a caption were drawn, but mixed. So a small head has to tell
from T5's tokens what lies in each ninth of the picture; minutes later it does, and is thrown away.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.miniature import learning, models, state
from benchmarks.miniature.captions import Encoders, caption
from benchmarks.miniature.curve import Curve
from benchmarks.miniature.scenes import COLOURS, GROUNDS, SHAPES, SIZES, Scene, trained

STEPS = 1200
CAPTIONS = 192  # a batch
FALLING_FROM = 0.5  # of the steps
HEADS = 4
NINTHS = 9
ARRANGEMENTS = ("place", "row", "column")
# What is told of each ninth (a shape more than there are: nothing), and of the whole picture.
OF_NINTHS = (len(SHAPES) + 1, len(COLOURS), len(SIZES))
OF_ALL = (3, len(ARRANGEMENTS), len(GROUNDS), len(COLOURS), len(COLOURS))
SHARE_OF_ALL = 0.3  # of the loss
UNKNOWN = -1


class Head(nn.Module):
    """Reads T5's tokens by attention, with one learned query for each ninth and one for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(NINTHS + 1, width) / 2)
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.ninth, self.all = nn.Linear(width, sum(OF_NINTHS)), nn.Linear(width, sum(OF_ALL))

    def forward(self, embeds: Tensor, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """T5's tokens [B, L, D] and their weights [L] → logits [B, 9, n] each, [B, n] each."""
        key, value = self.key_value(embeds).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query = self.query.unflatten(-1, (HEADS, -1)).transpose(0, 1)  # [H, 10, d]
        scores = (query * query.shape[-1] ** -0.5) @ key.mT + weights
        read = scores.softmax(-1) @ value
        x = self.out(read.transpose(1, 2).flatten(2)) + self.query
        x = x + self.mlp(self.norm(x))
        ninths, whole = self.ninth(x[:, :NINTHS]).float(), self.all(x[:, NINTHS]).float()
        return list(ninths.split(OF_NINTHS, -1)), list(whole.split(OF_ALL, -1))


class Reader(nn.Module):
    """T5 and the head; CLIP learns with the flow."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoders = Encoders(folder)
        self.encoders.clip.requires_grad_(False)
        self.head = Head(models.TEXT_WIDTH)


def facts(scene: Scene) -> tuple[list[list[int]], list[int]]:
    """What the head should tell of each ninth, and of all."""
    colours, nothing = tuple(COLOURS), [len(SHAPES), UNKNOWN, UNKNOWN]
    ninths = [nothing] * NINTHS
    for thing in scene.things:
        look = [SHAPES.index(thing.shape), colours.index(thing.colour), SIZES.index(thing.size)]
        ninths[3 * int(3 * thing.y) + int(3 * thing.x)] = look
    whole = [len(scene.things) - 1, ARRANGEMENTS.index(scene.arrangement)]
    whole += [GROUNDS.index(scene.ground)]
    whole += [colours.index(scene.ground_colours[place]) for place in (0, -1)]
    return ninths, whole


def train(folder: Path, curve: Curve) -> Path:
    """Train T5; its weights are in the file returned."""
    path = folder / "text.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    reader = Reader(folder / "tokenizers")
    encoders = reader.encoders

    def loss_of(step: int, random: Random) -> Tensor:
        scenes = [trained(random) for _ in range(CAPTIONS)]
        with learning.autocast():
            embeds, _, weights = encoders([caption(scene, random) for scene in scenes])
            ninths, whole = reader.head(embeds, weights)
        told = [facts(scene) for scene in scenes]
        of_ninths = torch.tensor([one[0] for one in told]).flatten(0, 1)
        of_all = torch.tensor([one[1] for one in told])
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), right, ignore_index=UNKNOWN)
            for logits, right in zip(ninths, of_ninths.unbind(1), strict=True)
        ]
        losses += [
            SHARE_OF_ALL * functional.cross_entropy(logits, right)
            for logits, right in zip(whole, of_all.unbind(1), strict=True)
        ]
        return torch.stack(losses).sum()

    def share(step: int) -> float:
        return min((step + 1) / 50, 1.0, (STEPS - step) / (STEPS * (1 - FALLING_FROM)))

    average = learning.run(
        "text",
        folder,
        curve,
        STEPS,
        reader,
        share,
        loss_of,
        after=lambda: models.close_positions(encoders.t5),
    )
    assert isinstance(average.module, Reader)
    state.save(path, average.module.encoders.t5.state_dict(), {})
    return path
