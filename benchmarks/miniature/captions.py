"""Captions into what the transformer takes, as training wants them: short, and with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.miniature import models, scenes
from krea_local.text import CLIP_TOKENS, T5_TOKENS
from krea_local.tiny import write_tokenizers

SYNONYMS = {"gray": "grey", "center": "middle", "picture": "photo", "purple": "violet"}


@cache
def words() -> tuple[str, ...]:
    """Every word that captions are made of, in a fixed order."""
    random = Random("words")
    found = {
        word
        for _ in range(20_000)
        for word in caption(scenes.sample(random), random, strange=0).replace(",", " ").split()
    }
    return tuple(sorted(found))


def caption(scene: scenes.Scene, random: Random, strange: float = 0.1) -> str:
    """A caption of `scene`, with synonyms, and a share of them with words that mean nothing."""
    said = scenes.caption(scene, random).split(" ")
    said = [SYNONYMS[word] if word in SYNONYMS and random.random() < 0.2 else word for word in said]
    if random.random() < strange:
        letters = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9)))
        said.insert(random.randint(0, len(said)), letters)
    return " ".join(said)


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
