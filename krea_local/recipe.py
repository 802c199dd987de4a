"""Images out: encode a picture with the recipe that made it, and read the recipe back.

A file carries its recipe as JSON for `krea-local --from`, as the `parameters` line that other tools
read, and an XMP mark that says it is AI-generated (IPTC digital source type
`trainedAlgorithmicMedia`, as the model's licence asks). Bytes are deterministic: no dates.
Knows nothing of requests or models; a recipe is a mapping.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from krea_local.errors import InvalidImage, OutputFailed

Recipe = Mapping[str, Any]

KEY = "krea_local"
JPEG_QUALITY = 95  # as the hosted API
PNG_COMPRESS_LEVEL = 1  # as the hosted API: 5 % larger, several times faster than 6
CONTENT_TYPES = {"jpeg": "image/jpeg", "png": "image/png"}
JPEG_MAX_BYTES = 64_000  # a JPEG segment holds 65,533; EXIF's own tables take some
PNG_MAX_BYTES = 1_000_000  # readers refuse a text chunk over 1 MiB

_IMAGE_DESCRIPTION, _SOFTWARE, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
   Iptc4xmpExt:DigitalSourceType=\
"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


class GeneratedImage(Image.Image):
    """A PIL image whose `save` writes its recipe too, for PNG and JPEG.

    The recipe is `info["krea_local"]`. Operations such as `resize` return plain PIL images.
    """

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """As `PIL.Image.Image.save`; metadata and quality given in `params` win."""
        target = fp if isinstance(fp, (str, bytes, os.PathLike)) else getattr(fp, "name", "")
        extension = ""
        if isinstance(target, (str, bytes, os.PathLike)):
            extension = Path(os.fsdecode(target)).suffix.lower()
        kind = format or Image.registered_extensions().get(extension, "")
        if kind.upper() in ("PNG", "JPEG"):
            params = {**_save_params(self._recipe(), kind.lower()), **params}
        super().save(fp, format, **params)

    def copy(self) -> Image.Image:
        """A copy that saves its recipe too."""
        duplicate = super().copy()
        return with_recipe(duplicate, self.info[KEY]) if KEY in self.info else duplicate

    __copy__ = copy

    def _recipe(self) -> Recipe | None:
        """None once the picture was changed in place: then only the mark is saved."""
        recipe = self.info.get(KEY)
        unchanged = recipe and (recipe["width"], recipe["height"]) == self.size
        return recipe if unchanged else None

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


def with_recipe(image: Image.Image, recipe: Recipe) -> GeneratedImage:
    """`image`, turned in place into one that saves its recipe."""
    image.info = {KEY: dict(recipe)}
    image.__class__ = GeneratedImage
    assert isinstance(image, GeneratedImage)
    return image


def encode(image: GeneratedImage, output_format: str) -> bytes:
    """The bytes of a JPEG or PNG file with pixels and recipe."""
    buffer = io.BytesIO()
    image.save(buffer, output_format.upper())
    return buffer.getvalue()


def write_atomically(data: bytes, path: Path, *, overwrite: bool = False) -> None:
    """Write `data` to `path`: all of it or nothing, never half.

    Raises:
        FileExistsError: `path` is there and `overwrite` is false.
        OutputFailed: the folder is missing or not writable, or the disk is full.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _rename_without_overwriting(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputFailed(f"cannot write {str(path)!r}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # it would hide the error that matters
            temporary.unlink(missing_ok=True)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe in a PNG or JPEG file that krea_local wrote.

    Raises:
        InvalidImage: the file cannot be read or carries no recipe of ours.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.format == "PNG":
                image.load()  # text chunks may follow the pixels
                text = str(getattr(image, "text", {}).get(KEY, ""))
            else:
                text = str(image.getexif().get(_IMAGE_DESCRIPTION, ""))
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InvalidImage(
            f"{os.fspath(path)!r}: cannot be read as PNG or JPEG: {error}"
        ) from error
    try:
        recipe = json.loads(text)[KEY]
    except (ValueError, KeyError, TypeError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise InvalidImage(
            f"{os.fspath(path)!r}: carries no krea_local recipe (stripped, or made by another tool)"
        )
    return recipe


def parameters_line(recipe: Recipe) -> str:
    """The recipe as the `parameters` text that galleries and web UIs read.

    FLUX.1 [dev] runs without classifier-free guidance, hence CFG scale 1; its `guidance_scale` is
    what those tools call the distilled one.
    """
    settings = {
        "Steps": recipe["num_inference_steps"],
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,
        "Distilled CFG Scale": recipe["guidance_scale"],
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model": recipe["model"],
    }
    if "strength" in recipe:
        settings["Denoising strength"] = recipe["strength"]
    settings["Version"] = recipe["version"]
    rest = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items())
    return f"{recipe['prompt']}\n{rest}".replace("\0", "")


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _save_params(recipe: Recipe | None, output_format: str) -> dict[str, Any]:
    if output_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", _XMP)
        if recipe:
            recipe = _fitted(recipe, PNG_MAX_BYTES)
            text.add_itxt("parameters", parameters_line(recipe))
            text.add_text(KEY, _json(recipe))
            text.add_text("Software", recipe["version"])
        return {"pnginfo": text, "compress_level": PNG_COMPRESS_LEVEL}
    exif = {"exif": _exif(_fitted(recipe, JPEG_MAX_BYTES))} if recipe else {}
    return {**exif, "xmp": _XMP.encode(), "quality": JPEG_QUALITY}


def _fitted(recipe: Recipe, max_bytes: int) -> Recipe:
    """`recipe`, with its prompt cut and marked as cut where the file could not hold it.

    T5 reads 512 tokens, so no picture needs more of its prompt than what is kept.
    """
    size = len(_json(recipe)) + len(parameters_line(recipe).encode("utf-16-be"))
    if size <= max_bytes:
        return recipe
    # A character takes at most 12 bytes in ASCII JSON and 4 in UTF-16.
    return {**recipe, "prompt": recipe["prompt"][: max_bytes // 18], "prompt_is_cut": True}


def _json(recipe: Recipe) -> str:
    return json.dumps({KEY: dict(recipe)})  # ASCII, by JSON's escapes


def _exif(recipe: Recipe) -> bytes:
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = _json(recipe)
    exif[_SOFTWARE] = recipe["version"]
    line = parameters_line(recipe).encode("utf-16-be")
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + line
    return exif.tobytes()


def _rename_without_overwriting(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as exFAT
        if path.exists():
            raise FileExistsError(path) from None
        temporary.replace(path)
