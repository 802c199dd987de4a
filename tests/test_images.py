from __future__ import annotations

import base64
import gzip
import http.server
import io
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from krea_local import InvalidImage, images
from krea_local.images import image_to_pixels, open_image, pixels_to_images


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert("RGB")


PNG = encoded(gradient(), "PNG")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_an_image_is_the_same_from_path_uri_bytes_and_pil(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    sources = [path, str(path), path.as_uri(), PNG, uri, Image.open(path), gradient()]
    opened = [open_image(source) for source in sources]
    assert len({image.sha256 for image in opened}) == 1
    assert len({image.image.tobytes() for image in opened}) == 1
    assert [image.name for image in opened[:3]] == ["a picture.png"] * 3
    assert all(image.notices == () for image in opened)


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/x.png").image.size == (40, 30)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = open_image(encoded(gradient((40, 30)), "JPEG", exif=exif))
    assert turned.image.size == (30, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_common_formats_are_read(kind: str) -> None:
    image = open_image(encoded(gradient(), kind)).image
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("RGB", (8, 8), "red").quantize(4)
    palette.info["transparency"] = 0
    for data in (
        encoded(clear, "PNG"),
        encoded(Image.new("LA", (8, 8), (0, 0)), "PNG"),
        encoded(palette, "PNG", transparency=0),
    ):
        opened = open_image(data)
        assert opened.image.getpixel((0, 0)) == (255, 255, 255)
        assert "laid on white" in opened.notices[0]
    half = open_image(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG")).image
    assert half.getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    opaque = open_image(encoded(Image.new("RGBA", (8, 8), "red"), "PNG"))
    assert opaque.image.getpixel((0, 0)) == (255, 0, 0)
    assert opaque.notices == ()


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (8, 8), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (8, 8), (200, 10, 10)).quantize(2), "PNG", (200, 10, 10)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), "PNG", (100, 100, 100)),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF", (128, 128, 128)),
    ],
    ids=["grey", "bilevel", "palette", "cmyk", "16-bit", "float"],
)
def test_every_mode_becomes_rgb(
    image: Image.Image, kind: str, expected: tuple[int, int, int]
) -> None:
    opened = open_image(encoded(image, kind)).image
    assert opened.mode == "RGB"
    assert opened.getpixel((4, 4)) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    opened = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert opened.image.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=6)
    assert "has 3 frames: the first is used" in opened.notices[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image"),
        (PNG[: len(PNG) // 2], "cannot be decoded: .*truncated"),
        (encoded(gradient((400, 300)), "JPEG")[:2000], "cannot be decoded"),
        (png_header(13000, 13000), "is 13000x13000, over 32 megapixels"),  # 169 megapixels
        (png_header(8000, 4001), "is 8000x4001, over 32 megapixels"),
        (png_header(60000, 60000), "."),  # beyond Pillow's own limit
        (png_header(0, 100), "."),
        (b"%PDF-1.4", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    ],
)
def test_bad_bytes_are_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=rf"image_url \(bytes\): {message}"):
        open_image(data)


def test_a_bomb_is_refused_from_its_header_without_decoding() -> None:
    start = time.thread_time()
    with pytest.raises(InvalidImage, match="over 32 megapixels"):
        open_image(png_header(13000, 13000))
    # Decoding 169 megapixels takes seconds and 500 MB; reading a header takes neither.
    assert time.thread_time() - start < 1


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InvalidImage, match="is not a regular file"):
            open_image(source)


def test_channels_named_a_are_not_transparency() -> None:
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    assert open_image(lab).notices == ()


def test_a_file_over_50_mib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(50 * 2**20 + 1)
    with pytest.raises(InvalidImage, match="over 50 MiB"):
        open_image(path)
    with pytest.raises(InvalidImage, match="over 50 MiB"):
        open_image("data:image/png;base64," + "A" * (70 * 2**20))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/x.png", "cannot read '/nowhere/x.png': No such file"),
        ("/", "cannot read '/': Is a directory"),
        ("a\0b", "is not a path"),
        ("~nobody-of-this-name/x.png", "image_url: '~nobody-of-this-name/x.png'"),
        ("data:image/png;base64", "needs a comma"),
        ("data:image/png;base64,****", "not valid base64"),
        ("data:text/plain,hello", "is not an image"),
        ("http://", "could not load"),
        ("file://[x", "is not a URL"),
        ("http://[bad/", "is not a URL: Invalid IPv6"),
    ],
)
def test_a_bad_source_is_refused_with_the_reason(source: str, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        open_image(source)


@given(st.binary(max_size=40), st.integers(0, len(PNG)))
def test_damaged_files_are_read_or_refused_and_nothing_else(noise: bytes, at: int) -> None:
    try:
        assert open_image(PNG[:at] + noise + PNG[at + len(noise) :]).image.mode == "RGB"
    except InvalidImage:
        pass


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_file_cut_anywhere_is_read_or_refused_and_nothing_else(kind: str) -> None:
    data = encoded(gradient((64, 48)), kind)
    refused = 0
    for at in range(0, len(data), max(1, len(data) // 60)):
        try:
            open_image(data[:at])
        except InvalidImage:
            refused += 1
    assert refused > 5


def test_deep_grey_without_a_mark_is_scaled_by_its_range() -> None:
    for image, expected in (
        (Image.new("L", (8, 8), 200).convert("I"), 200),
        (Image.fromarray(np.full((8, 8), 200.0, np.float32)), 200),
        (Image.fromarray(np.full((8, 8), 51400, np.int32)), 200),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), 0),
    ):
        assert open_image(image).image.getpixel((4, 4)) == pytest.approx((expected,) * 3, abs=1)


def test_a_transparent_colour_that_is_not_used_is_not_mentioned() -> None:
    image = Image.new("RGB", (8, 8), "red").quantize(4)
    opened = open_image(encoded(image, "PNG", transparency=3))
    assert opened.notices == ()
    assert opened.image.getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/redirect":
            self._answer(302, b"", {"Location": "/picture.png"})
        elif path == "/loop":
            self._answer(302, b"", {"Location": "/loop"})
        elif path == "/picture.png":
            self._answer(200, PNG)
        elif path == "/page":
            self._answer(200, b"<html>")
        elif path == "/large":
            self.send_response(200)
            self.end_headers()
            block = bytes(2**20)
            for _ in range(60):
                self.wfile.write(block)
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.05)
        elif path == "/gzip":
            body = gzip.compress(PNG)
            self._answer(200, body, {"Content-Encoding": "gzip, gzip"})
        elif path == "/slow-headers":
            for i in range(100):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" if i == 0 else b"X-%d: x\r\n" % i)
                self.wfile.flush()
                time.sleep(0.02)
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:50])
        else:
            self._answer(404, b"nothing")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client had enough
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except ConnectionError:
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def test_an_image_is_fetched_over_http_and_redirects_followed(server: str) -> None:
    opened = open_image(f"{server}/redirect?token=secret")
    assert opened.image.size == (40, 30)
    assert opened.name == "http://127.0.0.1/redirect"  # no port, no query: no secret
    assert opened.sha256 == open_image(PNG).sha256


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "answered 404 Not Found"),
        ("/page", "is not an image"),
        ("/loop", "could not load .*redirect"),
        ("/large", "is over 50 MiB"),
        ("/cut", "could not load"),
        ("/gzip", r"arrives compressed \(gzip, gzip\): not read"),
    ],
)
def test_a_bad_url_is_refused_with_the_reason(server: str, path: str, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        open_image(server + path)


@pytest.mark.parametrize("path", ["/drip", "/slow-headers"])
def test_a_slow_url_is_given_up(server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.3)
    with pytest.raises(InvalidImage, match=r"took over 0.3 s"):
        open_image(server + path)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://x", "http://127.0.0.1:9"])
def test_a_bad_proxy_is_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(InvalidImage, match="could not load http://example.invalid/x.png: ."):
        open_image("http://example.invalid/x.png")


def test_a_password_in_a_url_is_never_told() -> None:
    for url in ("http://user:secret@[bad/", "http://user:secret@127.0.0.1:9/x.png?token=secret"):
        with pytest.raises(InvalidImage) as caught:
            open_image(url)
        assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidImage, match="could not load http://127.0.0.1/x.png: .*refused"):
        open_image("http://127.0.0.1:9/x.png")


def test_pixels_survive_the_way_to_tensors_and_back() -> None:
    image = gradient()
    pixels = image_to_pixels(image)
    assert pixels.shape == (1, 3, 30, 40)
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    assert pixels_to_images(pixels)[0].tobytes() == image.tobytes()


def test_pixels_round_as_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pixels = torch.randn(2, 3, 16, 24) * 0.7
    theirs = VaeImageProcessor().postprocess(pixels, output_type="pil")
    assert [i.tobytes() for i in pixels_to_images(pixels)] == [i.tobytes() for i in theirs]
    theirs = VaeImageProcessor().preprocess(gradient((40, 32)))
    assert torch.allclose(image_to_pixels(gradient((40, 32))), theirs, rtol=0, atol=1e-6)
