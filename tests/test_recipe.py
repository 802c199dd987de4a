from __future__ import annotations

import copy
import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from krea_local import InvalidImage, InvalidRequest, OutputFailed, Result
from krea_local.recipe import (
    GeneratedImage,
    encode,
    parameters_line,
    read_recipe,
    with_recipe,
    write_atomically,
)
from krea_local.result import default_folder

RECIPE: dict[str, Any] = {
    "prompt": 'a "red" fox, 狐 🦊\nin snow: <b>&',
    "num_inference_steps": 28,
    "seed": 7,
    "guidance_scale": 4.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
    "acceleration": "none",
    "image_size": "landscape_4_3",
    "width": 48,
    "height": 32,
    "model": "black-forest-labs/FLUX.1-Krea-dev",
    "version": "krea_local 0.1.0",
}


def picture(**changes: Any) -> GeneratedImage:
    image = Image.radial_gradient("L").resize((48, 32)).convert("RGB")
    return with_recipe(image, {**RECIPE, **changes})


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "images": (picture(), picture(seed=8)),
        "seed": 7,
        "has_nsfw_concepts": (False, True),
        "timings": {"text": 0.25, "total": 1.5},
        "prompt": "A red fox, in *fresh* snow!",
    }
    return Result(**{**values, **changes})


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_file_carries_its_recipe_and_the_same_bytes_every_time(tmp_path: Path, kind: str) -> None:
    data = encode(picture(), kind)
    assert data == encode(picture(), kind)
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data)
    assert read_recipe(path) == RECIPE


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.JPEG"])
def test_pillows_own_save_carries_it_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    picture().save(path)
    assert read_recipe(path) == RECIPE
    with path.open("r+b") as file:
        picture().save(file)
    assert read_recipe(path) == RECIPE
    picture().save(str(path), quality=5)
    assert read_recipe(path) == RECIPE
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    assert b"krea_local" in buffer.getvalue()
    picture().save(tmp_path / "x.webp")  # other formats are Pillow's own affair
    assert picture().resize((8, 8)).getpixel((0, 0))


def test_copies_keep_the_recipe_and_changed_pictures_only_the_mark(tmp_path: Path) -> None:
    for name, image in (
        ("copy.jfif", picture().copy()),
        ("copy.apng", copy.copy(picture())),
    ):
        image.save(tmp_path / name)
        assert read_recipe(tmp_path / name) == RECIPE
    smaller = picture()
    smaller.thumbnail((16, 16))
    bare = picture()
    bare.info.clear()
    for image in (smaller, bare, bare.copy()):
        image.save(tmp_path / "x.png")
        assert b"trainedAlgorithmicMedia" in (tmp_path / "x.png").read_bytes() or image is not bare
        with pytest.raises(InvalidImage, match="carries no krea_local recipe"):
            read_recipe(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "..", "a\0b"])
def test_a_name_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name=.*without a folder"):
        result().save(tmp_path / "in", name=name)
    assert list(tmp_path.iterdir()) == []


def test_png_is_lossless_and_jpeg_is_of_the_hosted_quality() -> None:
    assert Image.open(io.BytesIO(encode(picture(), "png"))).tobytes() == picture().tobytes()
    plain = io.BytesIO()
    Image.Image.save(picture().resize((48, 32)), plain, "JPEG", quality=95)
    ours = Image.open(io.BytesIO(encode(picture(), "jpeg")))
    assert ours.quantization == Image.open(plain).quantization  # type: ignore[attr-defined]


def test_other_tools_find_the_parameters_where_they_look() -> None:
    png = Image.open(io.BytesIO(encode(picture(), "png")))
    jpeg = Image.open(io.BytesIO(encode(picture(), "jpeg")))
    comment = jpeg.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    for text in (png.info["parameters"], comment[8:].decode("utf-16-be")):
        assert text == (
            'a "red" fox, 狐 🦊\nin snow: <b>&\n'
            "Steps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
            "Distilled CFG Scale: 4.5, Seed: 7, Size: 48x32, "
            "Model: black-forest-labs/FLUX.1-Krea-dev, Version: krea_local 0.1.0"
        )
    assert "Denoising strength: 0.8" in parameters_line({**RECIPE, "strength": 0.8})
    assert 'Model: "a, b: c"' in parameters_line({**RECIPE, "model": "a, b: c"})


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_files_are_marked_as_ai_generated(kind: str) -> None:
    image = Image.open(io.BytesIO(encode(picture(), kind)))
    xmp = image.info["xmp" if kind == "jpeg" else "XML:com.adobe.xmp"]
    text = xmp.decode() if isinstance(xmp, bytes) else xmp
    assert "http://iptc.org/std/Iptc4xmpExt/2008-02-29/" in text
    assert (
        'DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"'
        in text
    )


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v exiftool"], capture_output=True).returncode != 0,
    reason="exiftool is not installed",
)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_exiftool_reads_the_mark_and_the_parameters(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(encode(picture(), kind))
    answer = subprocess.run(["exiftool", "-j", path], capture_output=True, text=True, check=True)
    (tags,) = json.loads(answer.stdout)
    assert tags["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert "Steps: 28" in tags["UserComment" if kind == "jpeg" else "Parameters"]
    assert "Warning" not in tags


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("character", ["a", "é", "狐", "🦊", '"', "\0"])
def test_a_prompt_of_any_length_fits_and_says_when_it_was_cut(
    tmp_path: Path, kind: str, character: str
) -> None:
    path = tmp_path / f"x.{kind}"
    for length in (1, 3000, 20_000, 700_000):
        path.write_bytes(encode(picture(prompt=character * length), kind))
        recipe = read_recipe(path)
        if recipe.get("prompt_is_cut"):
            assert len(recipe["prompt"]) >= 3500  # more than 512 tokens hold
            assert length >= 3500
        else:
            assert recipe["prompt"] == character * length


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", "png", "jpeg", "foreign"],
)
def test_a_file_without_a_recipe_is_told(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "x.png"
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "foreign":
        text = Image.Exif()
        text[0x010E] = '{"someone": "else"}'
        Image.new("RGB", (8, 8)).save(path, "JPEG", exif=text)
    else:
        Image.new("RGB", (8, 8)).save(path, data)
    with pytest.raises(
        InvalidImage, match=r"x.png'?: (cannot be read|carries no krea_local recipe)"
    ):
        read_recipe(path)
    with pytest.raises(InvalidImage, match="cannot be read"):
        read_recipe(tmp_path / "nothing.png")


def test_saving_names_files_after_prompt_and_seed_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first = result().save(folder)
    assert [path.name for path in first] == [
        "a-red-fox-in-fresh-snow-7.jpeg",
        "a-red-fox-in-fresh-snow-8.jpeg",
    ]
    second = result(output_format="jpeg").save(folder)
    assert [path.name for path in second] == [
        "a-red-fox-in-fresh-snow-7-2.jpeg",
        "a-red-fox-in-fresh-snow-8-2.jpeg",
    ]
    assert [read_recipe(path)["seed"] for path in first] == [7, 8]
    assert result(prompt="", output_format="png").save(folder)[0].name == "image-7.png"
    assert result(prompt="../../x").save(folder)[0].parent == folder
    assert result().save(folder, name="fox")[0].name == "fox-7.jpeg"
    assert len(list(folder.iterdir())) == 10
    assert len(max((p.name for p in result(prompt="long " * 99).save(folder)), key=len)) < 64


def test_to_api_is_the_hosted_apis_json(tmp_path: Path) -> None:
    answer = result().to_api(folder=tmp_path)
    assert list(answer) == ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]
    assert json.loads(json.dumps(answer)) == answer
    for image, seed in zip(answer["images"], (7, 8), strict=True):
        assert list(image) == ["url", "width", "height", "content_type"]
        assert (image["width"], image["height"]) == (48, 32)
        assert image["content_type"] == "image/jpeg"
        assert image["url"].startswith("file:///")
        assert read_recipe(image["url"].removeprefix("file://"))["seed"] == seed
    assert answer["timings"] == {"inference": 1.5, "text": 0.25, "total": 1.5}
    assert answer["has_nsfw_concepts"] == [False, True]


@pytest.mark.parametrize(("asked", "given"), [(True, None), (False, True)])
def test_to_api_gives_data_uris_in_sync_mode(asked: bool, given: bool | None) -> None:
    import base64

    answer = result(sync_mode=asked, output_format="png").to_api(sync_mode=given)
    for image in answer["images"]:
        head, data = image["url"].split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) in [encode(i, "png") for i in result().images]


def test_urls_without_a_folder_point_into_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path / "out"))
    assert str(tmp_path / "out") in result().to_api()["images"][0]["url"]
    monkeypatch.delenv("KREA_LOCAL_OUTPUT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "krea_local"


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="cannot make the folder .*file"):
        result().save(tmp_path / "file" / "folder")
    with pytest.raises(OutputFailed, match=r"cannot write .*nowhere/x.png': No such file"):
        write_atomically(b"x", tmp_path / "nowhere" / "x.png")
    with pytest.raises(OutputFailed, match="cannot write .*Not a directory"):
        write_atomically(b"x", tmp_path / "file" / "x.png")
    for path in ("a\0b", "~nobody-of-this-name"):
        with pytest.raises(InvalidRequest, match="nobody-of-this-name|NUL"):
            result().save(path)
    with pytest.raises(OutputFailed, match="cannot make the folder '/proc/x'"):
        result().save("/proc/x")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_behind_and_nothing_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.png"
    if overwrite:
        path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputFailed, match="No space left on device"):
        write_atomically(b"after", path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["x.png"] if overwrite else [])
    if overwrite:
        assert path.read_bytes() == b"before"


def test_a_real_write_error_leaves_nothing_behind(tmp_path: Path) -> None:
    # A limit on file sizes is a write error that even root meets.
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from krea_local import OutputFailed; from krea_local.recipe import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(bytes(5000), Path(sys.argv[1]) / 'x.png')\n"
        "except OutputFailed as error: print(error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    answer = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert re.search("cannot write .*: File too large", answer.stdout), answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_files_are_still_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refused)
    write_atomically(b"one", tmp_path / "x.png")
    with pytest.raises(FileExistsError):
        write_atomically(b"two", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1
