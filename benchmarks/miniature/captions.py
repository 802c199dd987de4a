"""Captions of scenes; and into what the transformer takes, short and with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.miniature import models
from benchmarks.miniature.scenes import Scene, sample
from krea_local.text import CLIP_TOKENS, T5_TOKENS
from krea_local.tiny import write_tokenizers

NUMBERS = {2: "two", 3: "three"}
CENTER = "in the center"  # and where a thing lies whose place is not said
SYNONYMS = {"gray": "grey", "center": "middle", "picture": "photo", "purple": "violet"}


@cache
def words() -> tuple[str, ...]:
    """Every word that captions are made of, in a fixed order."""
    random = Random("words")
    found = {
        word
        for _ in range(20_000)
        for word in caption(sample(random), random, strange=0).replace(",", " ").split()
    }
    return tuple(sorted(found))


def caption(scene: Scene, random: Random, strange: float = 0.1) -> str:
    """The scene in words, one of several ways to say it.

    Args:
        scene: what to say.
        random: which way.
        strange: share of the captions with a word that means nothing.
    """
    said = _things(scene, random)
    said = random.choice(("", "", "", "a picture of ", "a drawing of ", "an image of ")) + said
    said += " " + random.choice(("on ", "on ", "in front of ")) + _ground(scene, random)
    if random.random() < 0.15:
        said += random.choice((", flat design", ", simple", ", minimal", ", flat vector art"))
    words = said.split(" ")
    words = [SYNONYMS[one] if one in SYNONYMS and random.random() < 0.2 else one for one in words]
    if random.random() < strange:
        letters = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9)))
        words.insert(random.randint(0, len(words)), letters)
    return " ".join(words)


def _things(scene: Scene, random: Random) -> str:
    things = scene.things
    names = [_a(_words(thing.size, thing.colour, thing.shape)) for thing in things]
    if len(things) == 1:
        unsaid = scene.place == CENTER and random.random() < 0.5
        return names[0] if unsaid else _words(names[0], scene.place)
    if len({thing.kind for thing in things}) == 1:
        first = things[0]
        return _words(NUMBERS[len(things)], first.size, first.colour, f"{first.shape}s")
    if len(things) == 3:
        in_order = {"column": (" from top to bottom",), "row": ("", " from left to right")}
        order = random.choice(in_order[scene.arrangement])
        return f"{names[0]}, {names[1]} and {names[2]}{order}"
    one, two = names
    ways = {
        "row": (
            f"{one} and {two}",
            f"{one} next to {two}",
            f"{one} to the left of {two}",
            f"{one} left of {two}",
            f"{two} to the right of {one}",
            f"{two} right of {one}",
        ),
        "column": (
            f"{one} above {two}",
            f"{one} over {two}",
            f"{two} below {one}",
            f"{two} under {one}",
        ),
    }
    return random.choice(ways[scene.arrangement])


def _ground(scene: Scene, random: Random) -> str:
    first, last = scene.ground_colours[0], scene.ground_colours[-1]
    noun = random.choice(("background", "background", "ground"))
    ways = {
        "plain": (f"{first} {noun}", f"{first} {noun}", f"plain {first} {noun}"),
        "gradient": (f"gradient from {first} to {last}", f"{first} to {last} gradient"),
        "stripes": (
            f"{first} and {last} stripes",
            f"{noun} of {first} and {last} stripes",
            f"striped {first} and {last} {noun}",
        ),
    }
    said = random.choice(ways[scene.ground])
    return said if said == ways["stripes"][0] else _a(said)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _words(*words: str) -> str:
    return " ".join(filter(None, words))


class Encoders(nn.Module):
    """Both text encoders with their tokenizers."""

    def __init__(self, folder: Path) -> None:
        """Write the tokenizers to `folder`, which is made if need be, and make the encoders."""
        from transformers import CLIPTokenizer, T5TokenizerFast

        super().__init__()
        vocabulary = [*words()]
        # T5 tells upper from lower case: see `spread_cases`.
        cases = [*map(str.capitalize, vocabulary), *map(str.upper, vocabulary)]
        vocabulary += [word for word in dict.fromkeys(cases) if word not in vocabulary]
        folder.mkdir(parents=True, exist_ok=True)
        sizes = write_tokenizers(folder, vocabulary, ",.", clip_vocabulary=2000)
        self.clip, self.t5 = models.clip(sizes[0]), models.t5(sizes[1])
        # There and back in four fifths of the time that torch's own attention takes for so little.
        self.clip.set_attn_implementation("eager")
        self.clip_tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokenizer: Any = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")

    @torch.no_grad()
    def spread_cases(self) -> None:
        """Give words in capitals the meaning of those without, of which alone captions are made."""
        pieces: dict[str, int] = self.t5_tokenizer.get_vocab()
        embedding = self.t5.shared.weight
        for piece, index in pieces.items():
            if piece.lower() != piece and piece.lower() in pieces:
                embedding[index] = embedding[pieces[piece.lower()]]

    def forward(self, prompts: Iterable[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts → T5's tokens [B, L, 96], CLIP's summary [B, 64], logarithms of weights [L].

        The last token is padding, and weighs as much as all the padding that 512 tokens would have.
        """
        prompts = list(prompts)
        rows = [self.t5_tokenizer(prompt).input_ids for prompt in prompts]
        length = max(map(len, rows)) + 1
        padding = self.t5_tokenizer.pad_token_id
        padded = [row + [padding] * (length + models.REACH - len(row)) for row in rows]
        embeds = self.t5(torch.tensor(padded))[0][:, :length]
        tokens = self.clip_tokenizer(
            prompts, padding="longest", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        weights = torch.zeros(length)
        weights[-1] = math.log(T5_TOKENS - length + 1)
        return embeds, self.clip(tokens).pooler_output, weights
