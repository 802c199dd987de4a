"""The safety checker: which images are not safe for work.

Falconsai/nsfw_image_detection, a ViT of 85.8 M parameters, as the hosted service uses it: an image
is flagged where the softmax of its "nsfw" class passes a threshold. Knows nothing of requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krea_local.errors import GenerationFailed, WeightsInvalid, WeightsNotFound

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MAX_SIDE = 2048  # of the images that the checker looks at; the published one takes 224
THRESHOLD = 0.5  # the hosted service's; Black Forest Labs' own scripts use 0.85


class SafetyChecker:
    """Tells which images are not safe for work.

    Args:
        folder: config.json, preprocessor_config.json, model.safetensors.
        device: where it runs, in float32: 0.34 GB.
        threshold: an image is flagged where its probability of "nsfw" is above; 0 … 1.

    Raises:
        WeightsNotFound: a file is missing.
        WeightsInvalid: a file is damaged, or the classes do not include "nsfw".
    """

    def __init__(self, folder: Path, *, device: torch.device, threshold: float = THRESHOLD) -> None:
        import torch
        from transformers import ViTForImageClassification, ViTImageProcessorPil

        from krea_local.components import load_pretrained

        for name in ("config.json", "preprocessor_config.json"):
            if not (folder / name).exists():
                raise WeightsNotFound(f"no {name} in the safety checker's folder {str(folder)!r}")
        try:
            self._processor = ViTImageProcessorPil.from_pretrained(
                str(folder), local_files_only=True
            )
        except (OSError, ValueError, TypeError) as error:
            raise WeightsInvalid(f"{str(folder)!r} cannot be read: {error}") from error
        self._model = load_pretrained(
            ViTForImageClassification, folder, dtype=torch.float32, device=device
        )
        labels = self._model.config.label2id
        if "nsfw" not in labels:
            raise WeightsInvalid(f"{str(folder)!r} has the classes {sorted(labels)}, no 'nsfw'")
        self._nsfw = labels["nsfw"]
        self.threshold = threshold
        self._try(folder)

    def _try(self, folder: Path) -> None:
        """Fail now on what would fail after the picture is drawn."""
        from PIL.Image import new

        sides = [side for side in dict(self._processor.size).values() if side is not None]
        if not sides or max(sides) > MAX_SIDE:
            raise WeightsInvalid(f"{str(folder)!r} wants images of {sides}: at most {MAX_SIDE}")
        try:
            self.probabilities([new("RGB", (32, 32))])
        except (RuntimeError, ValueError, TypeError) as error:
            raise WeightsInvalid(f"{str(folder)!r} cannot look at an image: {error}") from error

    def probabilities(self, images: Sequence[Image]) -> list[float]:
        """For each image the probability that it is not safe for work, 0 … 1.

        Raises:
            GenerationFailed: the checker produced NaN.
        """
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits = self._model(inputs.to(self._model.device)).logits
        probabilities = [float(one) for one in logits.softmax(-1)[:, self._nsfw].cpu()]
        if not all(map(math.isfinite, probabilities)):
            raise GenerationFailed(
                "the safety checker produced NaN: its weights are damaged; get them again, or "
                "switch it off with enable_safety_checker=False"
            )
        return probabilities

    def flags(self, images: Sequence[Image]) -> list[bool]:
        """For each image whether it passes the threshold."""
        return [probability > self.threshold for probability in self.probabilities(images)]
