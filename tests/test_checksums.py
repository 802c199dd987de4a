from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from krea_local.checksums import compute_checksum, is_unchanged, noted_checksum, write_note

SHA256 = "a" * 64


def test_both_kinds_are_computed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"what is up, doc?")
    read: list[int] = []
    assert (
        compute_checksum(file, SHA256, read.append)
        == hashlib.sha256(b"what is up, doc?").hexdigest()
    )
    assert sum(read) == 16
    # Pro Git, chapter "Git Objects", has this one.
    assert compute_checksum(file, "b" * 40) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_a_note_is_the_hubs_clients(tmp_path: Path) -> None:
    from huggingface_hub._local_folder import read_download_metadata, write_download_metadata

    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "model.safetensors"
    file.write_bytes(b"x")
    name = "vae/model.safetensors"
    assert noted_checksum(tmp_path, name) is None
    write_note(tmp_path, name, SHA256, "c" * 40)
    theirs = read_download_metadata(tmp_path, name)
    assert theirs is not None
    assert (theirs.etag, theirs.commit_hash) == (SHA256, "c" * 40)
    write_download_metadata(tmp_path, name, "c" * 40, "b" * 64)
    assert noted_checksum(tmp_path, name) == "b" * 64
    assert is_unchanged(tmp_path, name, "b" * 64)
    assert not is_unchanged(tmp_path, name, SHA256)
    later = file.stat().st_mtime + 60
    os.utime(file, (later, later))
    assert not is_unchanged(tmp_path, name, "b" * 64)
    assert noted_checksum(tmp_path, name) == "b" * 64


@pytest.mark.parametrize("content", ["", "a\nb\nc\n", "c\n" + "a" * 64, f"c\n{SHA256}\nnever\n"])
def test_a_damaged_note_is_none(tmp_path: Path, content: str) -> None:
    write_note(tmp_path, "file", SHA256, "c")
    (tmp_path / ".cache/huggingface/download/file.metadata").write_text(content)
    assert noted_checksum(tmp_path, "file") is None


def test_a_link_of_the_cache_tells_by_its_name(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (snapshot / "small").symlink_to(f"../../blobs/{'b' * 40}")
    (snapshot / "large").symlink_to(f"../../blobs/{SHA256}")
    # The hub's client can share contents: a link to a link, whose name is no checksum.
    (blobs / SHA256).symlink_to(f"../../blobs/ff/{'f' * 64}")
    (snapshot / "other").symlink_to(f"../elsewhere/{SHA256}")
    assert noted_checksum(snapshot, "small") == "b" * 40
    assert noted_checksum(snapshot, "large") == SHA256
    assert noted_checksum(snapshot, "other") is None
