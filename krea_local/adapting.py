"""LoRAs of a call, added to the models while they are asked for; the weights stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from krea_local import text
from krea_local.checksums import SHA256, compute_checksum
from krea_local.engine import DiffusersEngine, Engine
from krea_local.errors import InvalidRequest, WeightsNotFound
from krea_local.lora import Adapters, LoraFile, read_adapters

if TYPE_CHECKING:
    from krea_local.loading import Models


@dataclass(frozen=True)
class Adaptation:
    """LoRAs, read from their files.

    Attributes:
        key: equal for files that have not changed.
        recipe: name, scale and SHA-256 of each file.
        adapters: what they add.
    """

    key: tuple[object, ...] | None = ()
    recipe: list[dict[str, object]] = field(default_factory=list)
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def has_text(self) -> bool:
        """Whether prompts are encoded otherwise."""
        return bool(self.adapters.text_encoder or self.adapters.text_encoder_2)


class Adapting:
    """Keeps the LoRAs of the last call, since the next one often has the same.

    Args:
        models: what they are added to.
        engine: that of their transformer.
        device: where they go.

    Attributes:
        current: what is added.
    """

    def __init__(
        self, models: Models, engine: Engine | DiffusersEngine, device: torch.device
    ) -> None:
        self._models = models
        self._engine = engine
        self._device = device
        self.current = Adaptation()

    def read(self, files: Sequence[LoraFile]) -> Adaptation | None:
        """What `files` add, in host memory; None if that is what is added already.

        Raises:
            InvalidRequest: engine="diffusers".
            WeightsNotFound, WeightsInvalid, UnsupportedModel: as `read_adapters`.
        """
        try:
            key = _key(files)
            if key == self.current.key:
                return None
            if not isinstance(self._engine, Engine):
                raise InvalidRequest("loras: are for engine='native'")
            recipe: list[dict[str, object]] = [
                {
                    "path": file.path.name,
                    "scale": file.scale,
                    "sha256": compute_checksum(file.path, SHA256),
                }
                for file in files
            ]
        except OSError as error:
            raise WeightsNotFound(f"cannot read {str(error.filename)!r}: {error}") from error
        models = self._models
        adapters = read_adapters(
            files, self._engine.transformer, models.text_encoder, models.text_encoder_2
        )
        return Adaptation(key, recipe, adapters)

    def add(self, wanted: Adaptation) -> None:
        """Have the models add this, and nothing else; nothing at all, if there is no memory."""
        assert isinstance(self._engine, Engine)
        self.current = Adaptation(key=None)  # like no other, should this be interrupted
        self._engine.adapt({})
        if wanted.key:
            adapters = wanted.adapters.to(self._device)
            self._engine.adapt(adapters.transformer)
            wanted = Adaptation(wanted.key, wanted.recipe, adapters)
        self.current = wanted

    @contextlib.contextmanager
    def encoders(self) -> Iterator[None]:
        """Have the text encoders add theirs inside the block."""
        models, adapters = self._models, self.current.adapters
        both: tuple[AbstractContextManager[None], ...] = (
            text.adapted(models.text_encoder, adapters.text_encoder),
            text.adapted(models.text_encoder_2, adapters.text_encoder_2),
        )
        with both[0], both[1]:
            yield


def _key(files: Sequence[LoraFile]) -> tuple[object, ...]:
    states = [(file, file.path.stat()) for file in files]
    return tuple((file.path, s.st_mtime_ns, s.st_size, file.scale) for file, s in states)
