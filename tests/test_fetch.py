"""Images by URL come from public addresses only; what is no image is found before it is decoded."""

from __future__ import annotations

import asyncio
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpcore
import pytest
from PIL import Image

from krea_local.errors import InvalidImage
from krea_local.server import dialling, fetch
from krea_local.server.dialling import NEVER, PRIVATE, Rules, may_dial
from krea_local.server.fetch import FetchFailed, ImageCheck, check_image, fetch_image

PUBLIC = "93.184.215.14"


def encoded(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise(size, 80).convert("RGB")
    noise.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded("PNG")


class Listener(ThreadingHTTPServer):
    """A web server on the loopback that counts who comes."""

    daemon_threads = True
    hits: list[str]

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Listener]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.hits.append(self.path)
            try:
                answer(self)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = Listener(("127.0.0.1", 0), Handler)
    server.hits = []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(
    handler: BaseHTTPRequestHandler,
    body: bytes,
    status: int = 200,
    **headers: str,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if "Content_Length" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


class Internet(httpcore.AsyncNetworkBackend):
    """A network in which the listener has a public address, and all others too.

    So what the rules let through is seen; nothing leaves this machine.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.dialled: list[str] = []
        self.real = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        return await self.real.connect_tcp("127.0.0.1", self.port, timeout)

    async def sleep(self, seconds: float) -> None:
        await self.real.sleep(seconds)


async def names(host: str) -> list[str]:
    """A resolver of our own: names of this test, and what the system's makes of numbers."""
    known = {
        "public.example": [PUBLIC],
        "both.example": [PUBLIC, "127.0.0.1"],
        "loopback.example": ["127.0.0.1"],
        "six.example": ["::1"],
        "mapped.example": ["::ffff:127.0.0.1"],
        "nat64.example": ["64:ff9b::7f00:1"],
        "cname-to-private.example": ["10.0.0.7"],
        "metadata.google.internal": ["169.254.169.254"],
        "none.example": [],
    }
    return known[host] if host in known else await dialling.system_addresses(host)


ADDRESSES = re.findall(
    r"\S+",
    """
127.0.0.1 127.0.0.2 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 017700000001
0x7f.1 127.0.0.1. 0 0.0.0.0 0.0.0.1 00000000.0.0.0 10.0.0.1 10.255.255.255 012.0.0.1 172.16.0.1
172.31.255.255 192.168.0.1 192.168.1.254 100.64.0.1 100.127.255.255 169.254.169.254 169.254.0.1
2852039166 0xa9fea9fe 0251.0376.0251.0376 168.63.129.16 192.0.0.1 192.0.0.192 192.0.2.1
198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1
255.255.255.255 192.88.99.1 192.31.196.1 192.175.48.1
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:10.0.0.1]
[::ffff:169.254.169.254] [::ffff:0:127.0.0.1] [::127.0.0.1] [::7f00:1] [::a00:1] [::ffff:0.0.0.0]
[64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::7f00:1]
[2002:7f00:1::] [2002:7f00:0001::1] [2002:a9fe:a9fe::1] [2002:0a00:0001::] [2001::1]
[2001:0:7f00:1::] [fe80::1] [fe80::5efe:7f00:1] [fe80::1%25lo] [fe80::1%25eth0] [fc00::1] [fd00::1]
[fd00:ec2::254] [fd20:ce::254] [fec0::1] [ff02::1] [ff01::1] [2001:db8::1] [3fff::1] [5f00::1]
[100::1] [2001:2::1] [2001:10::1] [2001:20::1]
localhost localhost. LOCALHOST loopback.example six.example mapped.example nat64.example
both.example cname-to-private.example metadata.google.internal none.example
""",
)
URLS = [
    "http://public.example@127.0.0.1:{port}/",
    "http://user:password@public.example/",
    "http://127.0.0.1:{port}#@public.example/",
    "http://127.0.0.1:{port}?@public.example/",
    "http://127.0.0.1:{port}\\@public.example/",
    "http://public.example\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://\t127.0.0.1:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\r\nHost: public.example",
    "http://127.0.0.1:{port}\0.public.example/",
    "http://[::1%25lo]:{port}/",
    "http://[::1:{port}/",
    "http://127.0.0.1:{port}:80/",
    "http://127.0.0.1%2f@public.example:{port}/",
    "http://127.0.0.1%00.public.example:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://ⓛocalhost:{port}/",
    "HTTP://LOCALHOST:{port}/",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "dict://127.0.0.1:{port}/",
    "ws://127.0.0.1:{port}/",
    "unix:///run/docker.sock",
    "http+unix://%2Frun%2Fdocker.sock/",
    "data:image/png;base64,AAAA",
    "http://",
    "http://:{port}/",
    "",
    "/etc/passwd",
    "http://127.0.0.1:99999/",
    "http://" + "a" * 300 + "/",
    "http://public.example/" + "a" * 9000,
]


def hostile(port: int) -> list[str]:
    return [f"http://{host}:{port}/" for host in ADDRESSES] + [
        url.replace("{port}", str(port)) for url in URLS
    ]


def test_no_hostile_url_reaches_a_listener_on_the_loopback() -> None:
    with listening(lambda handler: send(handler, PNG)) as server:
        urls = hostile(server.port)
        assert len(urls) >= 130

        async def outcome(url: str, rules: Rules) -> str:
            try:
                await fetch_image(url, rules)
            except FetchFailed as error:
                return str(error)
            return "fetched"

        async def all_outcomes(rules: Rules) -> list[str]:
            return [await outcome(url, rules) for url in urls]

        direct = asyncio.run(all_outcomes(Rules(resolve=names)))
        assert [url for url, said in zip(urls, direct, strict=True) if said == "fetched"] == []
        # And in a network that would lead every one of them to the listener.
        internet = Internet(server.port)
        asyncio.run(all_outcomes(Rules(resolve=names, network=internet)))
        assert internet.dialled == []
        assert server.hits == []


def test_no_redirect_leads_where_its_url_could_not() -> None:
    targets = [url for url in hostile(1) if url.isascii() and url.isprintable()]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        number = int(handler.path.strip("/"))
        send(handler, b"", 302 + 5 * (number % 2), Location=targets[number])

    with listening(answer) as server:
        internet = Internet(server.port)
        rules = Rules(resolve=names, network=internet)

        async def follow_all() -> None:
            for number in range(len(targets)):
                with pytest.raises(FetchFailed):
                    await fetch_image(f"http://public.example/{number}", rules)

        asyncio.run(follow_all())
        assert len(server.hits) >= 100
        # A relative or empty target is the public host again, whose answer redirects once more.
        assert set(internet.dialled) == {PUBLIC}


def test_five_redirects_are_followed_and_a_sixth_is_not() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        left = int(handler.path.strip("/"))
        if left:
            send(handler, b"", 302, Location=f"/{left - 1}")
        else:
            send(handler, PNG)

    with listening(answer) as server:
        rules = Rules(resolve=names, network=Internet(server.port))
        assert asyncio.run(fetch_image("http://public.example/5", rules)) == PNG
        with pytest.raises(FetchFailed, match="more than 5 times"):
            asyncio.run(fetch_image("http://public.example/6", rules))


def test_the_address_that_was_judged_is_the_one_dialled() -> None:
    """A name whose answer changes between looking and dialling gains nothing."""
    asked = []

    async def changing(host: str) -> list[str]:
        asked.append(host)
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    with listening(lambda handler: send(handler, PNG)) as server:
        internet = Internet(server.port)
        rules = Rules(resolve=changing, network=internet)
        assert asyncio.run(fetch_image("http://rebinding.example/", rules)) == PNG
        assert asked == ["rebinding.example"]
        with pytest.raises(FetchFailed, match="not asked from here"):
            asyncio.run(fetch_image("http://rebinding.example/", rules))
        assert internet.dialled == [PUBLIC]


def test_private_addresses_are_fetched_from_where_that_was_allowed_but_never_metadata() -> None:
    with listening(lambda handler: send(handler, PNG)) as server:
        url = f"http://127.0.0.1:{server.port}/a.png"
        assert asyncio.run(fetch_image(url, Rules(private=True))) == PNG
    for address in ("10.1.2.3", "192.168.1.2", "100.64.0.1", "::1", "fd12::1", "::ffff:10.0.0.1"):
        assert may_dial(address, private=True)
        assert not may_dial(address, private=False)
    for address in ("169.254.169.254", "fd00:ec2::254", "0.0.0.0", "::", "fe80::1", "2002:a00:1::"):
        assert not may_dial(address, private=True)


def test_public_addresses_may_be_dialled() -> None:
    for address in (PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert may_dial(address, private=False)
    assert not may_dial("public.example", private=True)


def test_every_network_of_the_reference_list_is_denied() -> None:
    ranges = pytest.importorskip("AntiSSRF").IPAddressRanges.recommended_latest
    import ipaddress

    known = (*NEVER, *PRIVATE)
    for text in ranges:
        network = ipaddress.ip_network(text)
        assert any(
            network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]
            for other in known
        ), text


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        listening(lambda handler: send(handler, b"proxied")) as proxy,
        listening(lambda handler: send(handler, PNG)) as server,
    ):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        url = f"http://127.0.0.1:{server.port}/"
        assert asyncio.run(fetch_image(url, Rules(private=True))) == PNG
        assert proxy.hits == []


def fetched(answer: Callable[[BaseHTTPRequestHandler], None]) -> bytes:
    with listening(answer) as server:
        url = f"http://127.0.0.1:{server.port}/"
        return asyncio.run(fetch_image(url, Rules(private=True)))


def test_a_file_over_the_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 100_000)
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while len(sent) < 10_000:
            handler.wfile.write(bytes(10_000))
            sent.append(1)

    with pytest.raises(FetchFailed, match="MiB, the limit"):
        fetched(endless)
    assert len(sent) < 10_000


def test_headers_that_arrive_a_byte_at_a_time_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        import time

        for byte in b"HTTP/1.1 200 OK\r\nX-Header: " + b"a" * 200:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)

    with pytest.raises(FetchFailed, match=r"took over 0\.3 s"):
        fetched(slow)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler: send(handler, b"", 404), "answered 404"),
        (lambda handler: send(handler, b"", 500), "answered 500"),
        (lambda handler: send(handler, PNG, Content_Encoding="gzip"), "compressed"),
        (lambda handler: send(handler, PNG, Content_Length="9999999"), "."),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "."),
        (lambda handler: handler.wfile.write(b""), "."),
    ],
)
def test_an_answer_that_is_no_image_is_told(
    answer: Callable[[BaseHTTPRequestHandler], None], reason: str
) -> None:
    with pytest.raises(FetchFailed, match=reason):
        fetched(answer)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_known_by_their_bytes_and_truncated_ones_refused(kind: str) -> None:
    data = encoded(kind)
    assert check_image(data) == (f"image/{kind.lower()}", 64, 48)
    for length in (13, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(InvalidImage):
            check_image(data[:length])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    with pytest.raises(InvalidImage, match="PNG, JPEG, WEBP are read"):
        check_image(encoded(kind))
    with pytest.raises(InvalidImage):
        check_image(b"")


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum


def test_megapixels_are_judged_by_the_header_before_anything_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
    with pytest.raises(InvalidImage, match="10000x10000, over 32 megapixels"):
        check_image(bomb + chunk(b"IEND", b""))


def test_a_large_image_is_checked_in_bounded_memory() -> None:
    import subprocess
    import sys

    code = """
import io, resource
from PIL import Image
from krea_local.server.fetch import check_image
files = []
for kind, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB")):
    buffer = io.BytesIO()
    Image.new(mode, (1000, 1000)).resize((6500, 4900)).save(buffer, kind, progressive=True)
    files.append(buffer.getvalue())
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
for data in files:
    assert check_image(data)[1:] == (6500, 4900)
print((peak() - before) / 2**20)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if "clear_refs" in ended.stderr:
        pytest.skip("this machine does not let the peak be reset")
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 256


def test_images_are_checked_one_at_a_time() -> None:
    async def work() -> list[tuple[str, int, int]]:
        check = ImageCheck()
        return await asyncio.gather(*(check(PNG) for _ in range(5)))

    assert asyncio.run(work()) == [("image/png", 64, 48)] * 5
