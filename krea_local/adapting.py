"""LoRAs of a call, added to the models while they are asked for; the weights stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from krea_local import text
from krea_local.checksums import SHA256, compute_checksum
from krea_local.engine import DiffusersEngine, Engine
from krea_local.errors import InvalidRequest
from krea_local.lora import Adapters, LoraFile, read_adapters

if TYPE_CHECKING:
    from krea_local.loading import Models


class Adapting:
    """Keeps the LoRAs of the last call, since the next one often has the same.

    Args:
        models: what they are added to.
        engine: that of their transformer.
        device: where they go.

    Attributes:
        recipe: name, scale and SHA-256 of each file.
    """

    def __init__(
        self, models: Models, engine: Engine | DiffusersEngine, device: torch.device
    ) -> None:
        self._models = models
        self._engine = engine
        self._device = device
        self._key: tuple[object, ...] = ()
        self._adapters = Adapters()
        self.recipe: list[dict[str, object]] = []

    def read(self, files: Sequence[LoraFile]) -> Adapters | None:
        """What `files` add, in host memory; None if that is what is added already.

        Raises:
            InvalidRequest: engine="diffusers".
            WeightsNotFound, WeightsInvalid, UnsupportedModel: as `read_adapters`.
        """
        files = [file for file in files if file.scale]
        if _key(files) == self._key:
            return None
        if not isinstance(self._engine, Engine):
            raise InvalidRequest("loras: are for engine='native'")
        models = self._models
        return read_adapters(
            files, self._engine.transformer, models.text_encoder, models.text_encoder_2
        )

    def add(self, files: Sequence[LoraFile], adapters: Adapters) -> bool:
        """Have the models add `adapters`, read from `files`, and nothing else.

        Returns:
            Whether prompts are encoded otherwise from now on.
        """
        assert isinstance(self._engine, Engine)
        had_text = self._has_text
        files = [file for file in files if file.scale]
        # Should there be no memory for the new ones.
        self._key, self._adapters, self.recipe = (), Adapters(), []
        self._engine.adapt({})
        there = adapters.to(self._device)
        self._engine.adapt(there.transformer)
        self._adapters = there
        self.recipe = [
            {
                "path": file.path.name,
                "scale": file.scale,
                "sha256": compute_checksum(file.path, SHA256),
            }
            for file in files
        ]
        self._key = _key(files)
        return had_text or self._has_text

    @property
    def _has_text(self) -> bool:
        return bool(self._adapters.text_encoder or self._adapters.text_encoder_2)

    @contextlib.contextmanager
    def encoders(self) -> Iterator[None]:
        """Have the text encoders add theirs inside the block."""
        models, adapters = self._models, self._adapters
        both: tuple[AbstractContextManager[None], ...] = (
            text.adapted(models.text_encoder, adapters.text_encoder),
            text.adapted(models.text_encoder_2, adapters.text_encoder_2),
        )
        with both[0], both[1]:
            yield


def _key(files: Sequence[LoraFile]) -> tuple[object, ...]:
    """Equal for the same content."""
    states = [(file, file.path.stat()) for file in files]
    return tuple((file.path, s.st_mtime_ns, s.st_size, file.scale) for file, s in states)
