"""What the server was started with: checked once, then passed around.

Knows nothing of HTTP, jobs or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from krea_local.paths import cache_folder


@dataclass(frozen=True)
class Settings:
    """What the server was started with.

    Attributes:
        model: as `krea_local.load` takes it; None for its default.
        load: the other keywords of `krea_local.load`: memory, offload, acceleration, …
        devices: one worker process each: "cuda:0", "cpu"; "auto" for what `load` finds.
        host: address to listen on.
        port: 0 for any free one.
        api_key: what clients must present; None for no key, on this machine's own address only.
        hosts: names by which clients may call the server, beside its own address and localhost.
        origins: web origins, beside the server's own, whose pages may call it: "https://my.app".
        folder: where the database and the files live.
        keep_seconds: finished jobs and their files go after so long; None for never.
        keep_bytes: the oldest finished jobs go while files take more; None for no limit.
        max_queue: jobs waiting at the most; beyond, 429.
        job_seconds: a job that runs longer is cancelled and failed.
        low_disk: with less free bytes than this no job starts or is accepted.
        private_urls: whether input images may come from private addresses.
        webhook_private_urls: whether webhooks may go to private addresses, this machine's too.
        public_url: how clients reach the server, where a proxy stands before it; else as asked.
    """

    model: str | None = None
    load: Mapping[str, object] = field(default_factory=dict)
    devices: tuple[str, ...] = ("auto",)
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    folder: Path = field(default_factory=lambda: cache_folder() / "server")
    keep_seconds: float | None = None
    keep_bytes: int | None = None
    max_queue: int = 5000
    job_seconds: float = 1800.0
    low_disk: int = 512 * 2**20
    private_urls: bool = False
    webhook_private_urls: bool = False
    public_url: str | None = None
