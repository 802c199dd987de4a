"""What was submitted is on the disk; what a crash left is found; what is old goes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from krea_local.errors import OutputFailed
from krea_local.server.changes import MAX_ATTEMPTS, Waiting
from krea_local.server.files import Files, content_type, new_id
from krea_local.server.jobs import Failure, Job, Log, Outcome, Picture, StoredFile
from krea_local.server.store import SCHEMA_VERSION, Store
from krea_local.server.waiting import Queue

T = TypeVar("T")


def job(name: str, **told: object) -> Job:
    whole = Job(name, "fal-ai/flux/krea", {"prompt": name}, "queued", time.time())
    return replace(whole, **told)  # type: ignore[arg-type]


def stored(store: Store, data: bytes = b"picture", name: str = "p.png") -> StoredFile:
    file = StoredFile(new_id(), "image/png", len(data), name)
    store.files.write(file.id, data)
    return file


def done(one: Job, *files: StoredFile) -> Job:
    pictures = tuple(Picture(file, 64, 64) for file in files)
    outcome = Outcome(pictures, 7, (False,) * len(files), {"total": 1.0}, ("said",))
    return replace(one, state="done", finished=time.time(), outcome=outcome)


def line(message: str) -> Log:
    return Log(message, "INFO", time.time())


def run(work: Coroutine[None, None, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path / "store")
    yield one
    one.close()


def open_again(store: Store) -> None:
    """Have in `store` what a server finds that starts after this one ended."""
    store.close()
    vars(store).update(vars(Store(store.folder)))


def test_a_job_comes_back_as_it_was_submitted_and_ended(store: Store) -> None:
    async def work() -> None:
        one = job("a", webhook="https://a.example/hook")
        await store.add_job(one, Waiting())
        assert store.job("a") == one
        log = line("starts")
        await store.claim("a", log)
        ended = done(replace(one, started=log.timestamp, attempts=1), stored(store))
        await store.finish(ended, [line("ends")])
        assert store.job("a") == ended
        assert [log.message for log in store.logs("a")] == ["starts", "ends"]
        assert ended.outcome is not None
        file = ended.outcome.pictures[0].file
        assert store.file(file.id) == file
        failed = job("b", state="failed", finished=1.0, failure=Failure(500, None, {"detail": "x"}))
        await store.add_job(job("b", created=failed.created), Waiting())
        await store.finish(failed)
        assert store.job("b") == failed

    run(work())
    assert store.job("c") is None
    assert store.file(new_id()) is None


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    code = """
import asyncio, os, signal, sys
from pathlib import Path
from krea_local.server.changes import Waiting
from krea_local.server.jobs import Job
from krea_local.server.store import Store
async def main():
    store = Store(Path(sys.argv[1]))
    for i in range(20):
        await store.add_job(Job(str(i), "e", {}, "queued", 1.0), Waiting())
        print(i, flush=True)
    asyncio.ensure_future(store.claim("0", None))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store = Store(tmp_path)
    assert [one.id for one, _ in store.waiting()] == ended.stdout.split()
    store.close()


def test_many_submits_at_once_share_few_transactions_and_keep_their_order(store: Store) -> None:
    async def work() -> list[Waiting]:
        return await asyncio.gather(*(store.add_job(job(str(i)), Waiting()) for i in range(2000)))

    places = [waiting.seq for waiting in run(work())]
    assert places == sorted(places)
    assert [one.id for one, _ in store.waiting()] == [str(i) for i in range(2000)]
    assert store.writer.commits < 100


def test_a_change_that_fails_takes_no_other_with_it(store: Store) -> None:
    async def work() -> list[Waiting | BaseException]:
        lost = Waiting(input=new_id())
        return await asyncio.gather(
            store.add_job(job("a"), Waiting()),
            store.add_job(job("a"), Waiting()),
            store.add_job(job("b"), lost),
            store.add_job(job("c"), Waiting()),
            return_exceptions=True,
        )

    first, second, third, fourth = run(work())
    assert isinstance(first, Waiting)
    assert isinstance(second, sqlite3.IntegrityError)
    assert isinstance(third, LookupError)
    assert isinstance(fourth, Waiting)
    assert [one.id for one, _ in store.waiting()] == ["a", "c"]


def test_two_servers_never_share_a_folder(store: Store) -> None:
    with pytest.raises(OutputFailed, match=f"another server, process {os.getpid()}, uses"):
        Store(store.folder)
    open_again(store)


def test_a_newer_versions_database_is_refused_and_left_alone(store: Store) -> None:
    store.close()
    path = store.folder / "jobs.sqlite3"
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(OutputFailed, match="is of a newer krea_local"):
        Store(store.folder)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.close()
    vars(store).update(vars(Store(store.folder)))  # the lock was let go of


def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(b"something else" * 1000)
    with pytest.raises(OutputFailed, match="cannot use"):
        Store(tmp_path)


def test_what_ran_at_a_crash_waits_again_where_it_was(store: Store) -> None:
    async def before() -> None:
        for name in "abc":
            await store.add_job(job(name), Waiting())
        await store.claim("a", line("starts"))

    run(before())
    open_again(store)
    assert [(one.id, one.attempts) for one, _ in store.waiting()] == [("a", 1), ("b", 0), ("c", 0)]
    assert "it waits again" in store.logs("a")[-1].message


def test_a_job_that_three_servers_died_at_has_failed(store: Store) -> None:
    run(store.add_job(job("a", webhook="http://x.example"), Waiting()))
    for _ in range(MAX_ATTEMPTS):
        run(store.claim("a", line("starts")))
        open_again(store)
    one = store.job("a")
    assert one is not None
    assert one.state == "failed"
    assert one.failure is not None
    assert one.failure.status == 500
    assert "3 attempts" in str(one.failure.body["detail"])
    assert store.waiting() == []
    assert [delivery.job for delivery in store.deliveries()] == ["a"]


def test_a_job_that_was_being_cancelled_at_a_crash_is_not_run_again(store: Store) -> None:
    run(store.add_job(job("a"), Waiting()))
    run(store.claim("a", line("starts")))
    run(store.mark_cancelling("a"))
    open_again(store)
    one = store.job("a")
    assert one is not None
    assert one.state == "cancelled"


def test_a_job_handed_back_at_a_stop_has_not_used_an_attempt(store: Store) -> None:
    run(store.add_job(job("a"), Waiting()))
    run(store.claim("a", line("starts")))
    run(store.hand_back("a", line("the server stops"), count_attempt=False))
    ((one, _),) = store.waiting()
    assert (one.state, one.attempts, one.started) == ("queued", 0, None)


def test_files_that_a_crash_left_are_swept_and_no_others(store: Store) -> None:
    kept = stored(store)
    run(store.add_upload(kept))
    stray = stored(store)
    partial = store.files.path(stray.id).with_name(f".{stray.id}.part")
    partial.write_bytes(b"half")
    open_again(store)
    assert store.swept == 2
    assert store.files.path(kept.id).read_bytes() == b"picture"
    assert not store.files.path(stray.id).exists()
    assert not partial.exists()


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    files = Files(tmp_path)
    name = new_id()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputFailed, match="cannot write a file"):
            files.write(name, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.glob("*/*")) == []


def test_prompts_and_pictures_are_for_this_user_alone(store: Store) -> None:
    assert (store.folder / "jobs.sqlite3").stat().st_mode & 0o077 == 0
    assert store.files.folder.stat().st_mode & 0o077 == 0


def finished_jobs(store: Store, *names: str) -> dict[str, StoredFile]:
    """Jobs that were done a second apart, the first a thousand seconds ago, 7 bytes each."""

    async def work() -> dict[str, StoredFile]:
        files = {}
        for i, name in enumerate(names):
            one = job(name)
            await store.add_job(one, Waiting())
            files[name] = stored(store)
            ended = replace(done(one, files[name]), finished=time.time() - 1000 + i)
            await store.finish(ended)
        return files

    return run(work())


def test_the_oldest_jobs_go_while_files_take_too_much(store: Store) -> None:
    files = finished_jobs(store, "a", "b", "c")
    assert run(store.expire(keep_seconds=None, keep_bytes=15)) == ["a"]
    assert store.job("a") is None
    assert not store.files.path(files["a"].id).exists()
    assert store.files.path(files["b"].id).exists()
    assert run(store.expire(keep_seconds=2000, keep_bytes=14)) == []


def test_what_is_older_than_may_be_goes_but_not_what_is_waited_for(store: Store) -> None:
    finished_jobs(store, "a", "b")

    async def work() -> list[str]:
        used, unused = stored(store), stored(store)
        await store.add_upload(used)
        await store.add_upload(unused)
        await store.add_job(job("waits"), Waiting(input=used.id))
        told = job("told", webhook="http://x.example")
        await store.add_job(told, Waiting())
        await store.finish(replace(done(told), finished=time.time() - 500))
        gone = await store.expire(keep_seconds=-1, keep_bytes=None)
        assert store.file(used.id) is not None
        assert store.files.path(used.id).exists()
        assert store.file(unused.id) is None
        assert not store.files.path(unused.id).exists()
        return gone

    assert run(work()) == ["a", "b"]
    assert [delivery.job for delivery in store.deliveries()] == ["told"]


def test_only_a_finished_job_is_deleted_and_its_files_go_with_it(store: Store) -> None:
    files = finished_jobs(store, "a")
    run(store.add_job(job("waits"), Waiting()))
    assert run(store.delete("waits")) is False
    assert run(store.delete("nothing")) is False
    assert run(store.delete("a")) is True
    assert store.job("a") is None
    assert store.logs("a") == []
    assert not store.files.path(files["a"].id).exists()


def test_recent_jobs_come_newest_first_and_page_by_page(store: Store) -> None:
    finished_jobs(store, *"abcde")
    assert [one.id for one in store.recent(limit=2, before=None)] == ["e", "d"]
    assert [one.id for one in store.recent(limit=2, before="d")] == ["c", "b"]
    assert store.recent(limit=2, before="nothing") == []


def test_the_queue_keeps_order_and_low_priority_waits_for_all_others() -> None:
    queue = Queue()
    queue.put("low", Waiting(seq=1, low_priority=True))
    queue.put("a", Waiting(seq=2))
    queue.put("no image", Waiting(seq=3, source="http://x.example"))
    queue.put("b", Waiting(seq=4))
    assert [queue.position(name) for name in ("a", "no image", "b", "low")] == [0, 1, 2, 3]
    assert queue.position("nobody") == 0
    assert [queue.take(), queue.take()] == [("a", Waiting(seq=2)), ("b", Waiting(seq=4))]
    queue.put("a", Waiting(seq=2))  # its worker died
    queue.put("no image", Waiting(seq=3, source="http://x.example", input="file"))
    assert list(queue) == ["a", "no image", "low"]
    assert len(queue) == 3
    assert queue.remove("low") == Waiting(seq=1, low_priority=True)
    assert queue.remove("low") is None
    assert "low" not in queue


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"GIF89a", None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_a_content_type_is_judged_from_the_bytes(data: bytes, kind: str | None) -> None:
    assert content_type(data) == kind
