"""The command `krea-local serve`: its flags, what they mean, and what it says.

Flags that could open the server to others are judged here, before anything listens.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from krea_local.errors import InvalidRequest
from krea_local.flags import FAILED, LOADING, OK, add_loading, one_line
from krea_local.paths import expanded

if TYPE_CHECKING:
    from krea_local.server.settings import Settings

KEY_VARIABLE = "KREA_LOCAL_API_KEY"
MIN_KEY_CHARACTERS = 16
# Flags of `serve` and the fields of Settings that they set as they are.
SERVE_FLAGS = {
    "host": "host",
    "port": "port",
    "allow_host": "hosts",
    "allow_origin": "origins",
    "public_url": "public_url",
    "keep": "keep_seconds",
    "keep_size": "keep_bytes",
    "max_queue": "max_queue",
    "job_time": "job_seconds",
    "low_disk": "low_disk",
    "allow_private_urls": "private_urls",
    "allow_private_webhooks": "webhook_private_urls",
}


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of `krea-local serve`."""
    add_loading(command)
    command.add_argument(
        "--acceleration",
        metavar="LEVEL",
        help='"none", "regular" or "high", for calls that name none (default: none)',
    )
    group = command.add_argument_group("server")
    group.add_argument(
        "--gpus",
        metavar="N[,N…]",
        type=_gpus,
        help="one worker process on each of these GPUs: 0,1 (default: one, where --device says)",
    )
    group.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, help="0 for any free one (default: 8080)")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"holds the key that clients must present; or set ${KEY_VARIABLE}. Needed to listen "
        "on any other address than this machine's own",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="a name by which clients may call the server, beside localhost and its address",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="a web origin whose pages may call the server: https://my.app",
    )
    group.add_argument(
        "--public-url", metavar="URL", help="how clients reach it, where a proxy stands before it"
    )
    group.add_argument(
        "--tls", action="store_true", help="HTTPS, with a certificate made for this machine"
    )
    group = command.add_argument_group("jobs and files")
    group.add_argument("--folder", metavar="DIR", help="database and pictures (default: the cache)")
    group.add_argument(
        "--keep",
        metavar="TIME",
        type=_duration,
        help="delete finished jobs and their pictures after 12h or 7d; none for never (default)",
    )
    group.add_argument(
        "--keep-size",
        metavar="SIZE",
        type=_bytes,
        help="delete the oldest while files take more than 20GB (default: no limit)",
    )
    group.add_argument(
        "--max-queue", type=int, metavar="N", help="jobs that may wait (default: 5000)"
    )
    group.add_argument(
        "--job-time",
        metavar="TIME",
        type=_duration,
        help="a job that runs longer is cancelled (default: 30m)",
    )
    group.add_argument(
        "--low-disk",
        metavar="SIZE",
        type=_bytes,
        help="start and take no job while the disk has less free (default: 512MiB)",
    )
    group.add_argument(
        "--allow-private-urls",
        action="store_true",
        help="fetch input images from private addresses too, and LoRAs from any",
    )
    group.add_argument(
        "--allow-private-webhooks", action="store_true", help="likewise for webhooks"
    )
    group.add_argument("--log", action="store_true", help="a line of JSON a request on stderr")


def run(parsed: argparse.Namespace) -> int:
    """Serve until a signal says otherwise; the exit code."""
    given = vars(parsed)
    settings = settings_of(given)
    try:
        from krea_local.server import app, tls
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("krea_local"):
            raise
        print(
            f"krea-local: serve needs {error.name}: pip install 'krea_local[server]'",
            file=sys.stderr,
        )
        return FAILED
    if "log" in given:
        import logging

        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
        for chatty in ("httpx", "httpcore", "uvicorn"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    certificate = None
    if "tls" in given:
        certificate = tls.certificate(settings.folder / "tls", [settings.host, *settings.hosts])

    def on_listening(address: str) -> None:
        print(f"krea-local: listening on {address}", flush=True)
        if certificate is not None:
            place = address.removeprefix("https://").replace("127.0.0.1", "localhost")
            print("krea-local: for the official Python client:", flush=True)
            for line in certificate.environment(place, has_key=settings.api_key is not None):
                print(f"  export {line}", flush=True)

    def on_ready(text: str) -> None:
        print(f"krea-local: {one_line(text)}", flush=True)

    def on_stopping() -> None:
        print(
            "krea-local: stopping when the pictures under way are done; Ctrl-C again: at once",
            file=sys.stderr,
            flush=True,
        )

    files = None if certificate is None else (str(certificate.chain), str(certificate.key))
    app.serve(
        settings,
        on_listening=on_listening,
        on_ready=on_ready,
        on_stopping=on_stopping,
        certificate=files,
    )
    return OK


def settings_of(given: Mapping[str, Any]) -> Settings:
    """What the flags of `serve` say.

    Raises:
        InvalidRequest: a flag is wrong, or would open the server to all.
    """
    from krea_local.server.settings import Settings

    named = {
        name: given[flag]
        for flag, name in SERVE_FLAGS.items()
        if flag in given and given[flag] is not None
    }
    for name in ("hosts", "origins"):
        named[name] = tuple(named.get(name, ()))
    for origin in named["origins"]:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise InvalidRequest(f"--allow-origin {origin}: should be such as https://my.app")
    if not re.fullmatch(r"https?://[^/?#\s]+/?", named.get("public_url", "http://x")):
        raise InvalidRequest("--public-url: should be such as https://pictures.example")
    if not 0 <= named.get("port", 0) < 65536:
        raise InvalidRequest(f"--port {named['port']}: should be from 0 to 65535")
    if "job_time" in given and given["job_time"] is None:
        raise InvalidRequest("--job-time none: should be such as 30m")
    if named.get("max_queue", 1) < 1:
        raise InvalidRequest(f"--max-queue {named['max_queue']}: should be 1 or more")
    if "folder" in given:
        named["folder"] = expanded(given["folder"])
    load = {name: given[name] for name in (*LOADING, "acceleration") if name in given}
    load.pop("device", None)
    if "gpus" in given and "device" in given:
        raise InvalidRequest("give --gpus or --device, not both")
    if "device" in given:
        named["devices"] = (given["device"],)
    if "gpus" in given:
        named["devices"] = tuple(f"cuda:{number}" for number in given["gpus"])
    settings = Settings(
        model=given.get("model"), load=load, api_key=_api_key(given.get("api_key_file")), **named
    )
    if settings.api_key is None and not _is_loopback(settings.host):
        raise InvalidRequest(
            f"--host {settings.host}: whoever reaches that address could draw on your GPU; set "
            f"{KEY_VARIABLE} or give --api-key-file, or leave --host out"
        )
    return settings


def _api_key(file: str | None) -> str | None:
    """The key, from a file or the environment: arguments are for all to see."""
    key = os.environ.get(KEY_VARIABLE)
    if file is not None:
        try:
            key = expanded(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"--api-key-file {file}: cannot be read: {error}") from error
    if key is None:
        return None
    if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequest(
            f"the API key should be {MIN_KEY_CHARACTERS} or more letters and digits: make one with "
            "`openssl rand -hex 16`"
        )
    return key


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _gpus(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", text):
        raise argparse.ArgumentTypeError("should be numbers such as 0,1")
    numbers = [int(one) for one in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError("names a GPU twice")
    return numbers


def _duration(text: str) -> float | None:
    if text == "none":
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError("should be such as 90s, 30m, 12h or 7d, or none")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?([KMGT]i?)B", text)
    if match is None:
        raise argparse.ArgumentTypeError("should be such as 500MB or 20GB")
    base = 1024 if match[2].endswith("i") else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2][0]) + 1))
