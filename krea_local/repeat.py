"""A picture's recipe turned back into the call that draws it again.

A recipe is a stranger's word: its values are judged like any other input, and it is never a reason
to fetch a model. Knows nothing of how pictures are made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krea_local import weights
from krea_local._version import __version__
from krea_local.checksums import SHA256, compute_checksum
from krea_local.errors import InvalidRequest, WeightsError
from krea_local.images import open_image
from krea_local.loading import check_layout
from krea_local.lora_files import find_lora
from krea_local.recipe import read_recipe
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest


@dataclass(frozen=True)
class Repeat:
    """How to draw a picture again.

    Attributes:
        arguments: of the request, but for an input image.
        made_with: what the recipe calls its model.
        model: that model as `load` takes it, if it is on this machine; else None.
        notices: why the new picture may differ.
    """

    arguments: dict[str, Any]
    made_with: str
    model: str | None
    notices: tuple[str, ...]


def read_repeat(
    picture: str, request: type[Txt2ImgRequest] | type[Img2ImgRequest], given: Mapping[str, Any]
) -> Repeat:
    """How to draw `picture` again, but for the arguments `given` besides.

    Raises:
        InvalidImage: the file cannot be read, or carries no recipe.
        InvalidRequest: it was made by the other command, or something must be given besides.
    """
    recipe = read_recipe(picture)
    made_by = Img2ImgRequest if "image_sha256" in recipe else Txt2ImgRequest
    if made_by is not request:
        name = "img2img" if made_by is Img2ImgRequest else "txt2img"
        raise InvalidRequest(f"--from {picture}: was made by {name}; use krea-local {name}")
    if recipe.get("prompt_is_cut") and "prompt" not in given:
        raise InvalidRequest(f"--from {picture}: its prompt was too long to keep: give it again")
    notices = []
    if made_by is Img2ImgRequest:
        if "image_url" not in given:
            origin = recipe.get("image_name") or "an unnamed image"
            raise InvalidRequest(f"--from {picture}: redrew {origin}; give that as --image-url")
        if open_image(given["image_url"]).sha256 != recipe["image_sha256"]:
            notices.append(f"{given['image_url']} is not the image that {picture} was made from")
    notices += _different_loras(picture, recipe, given)
    version = f"krea_local {__version__}"
    if recipe.get("version") != version:
        notices.append(
            f"{picture} was made by {recipe.get('version')}, this is {version}: details may differ"
        )
    made_with = str(recipe.get("model"))
    # Whether to screen pictures is this user's decision, not the recipe's.
    fields = set(request.model_fields) - {"enable_safety_checker", "loras"}
    return Repeat(
        arguments={name: recipe[name] for name in recipe if name in fields},
        made_with=made_with,
        model=_at_hand(made_with),
        notices=tuple(notices),
    )


def _different_loras(
    picture: str, recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """What to say if the LoRAs given are not those that the picture was made with.

    Raises:
        InvalidRequest: it was made with some, and none are given.
    """
    made_with = recipe.get("loras")
    if not isinstance(made_with, list) or not all(isinstance(one, dict) for one in made_with):
        made_with = []
    if made_with and "loras" not in given:
        names = " ".join(f"--lora {one.get('path')}:{one.get('scale')}" for one in made_with)
        raise InvalidRequest(f"--from {picture}: was made with LoRAs; give them: {names}")
    scales = [(one["path"], float(one.get("scale", 1))) for one in given.get("loras", [])]
    found = [
        (compute_checksum(find_lora(path, progress=False), SHA256), scale)
        for path, scale in scales
        if scale
    ]
    if found != [(one.get("sha256"), one.get("scale")) for one in made_with]:
        return [f"these are not the LoRAs that {picture} was made with"]
    return []


def _at_hand(made_with: str) -> str | None:
    """The model as a folder, from which nothing is fetched; None if it is not all here."""
    if made_with in ("mini", "tiny"):
        return made_with
    if made_with in {family.repo for family in weights.FAMILIES}:
        with contextlib.suppress(WeightsError):
            checkpoint = weights.find(made_with, fetch=False)
            check_layout(checkpoint)
            if checkpoint.transformer_file is None:
                return str(checkpoint.folder)
    return None
