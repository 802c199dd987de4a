"""The crash benchmark, shortened: the real server and workers, really killed."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.serving_crash import Crash


def test_nothing_is_lost_torn_or_different_when_server_and_worker_are_killed(
    tmp_path: Path,
) -> None:
    report = Crash(tmp_path / "server", jobs=30, kills=6, chance=random.Random(1)).run()
    assert report.jobs == 30
    assert report.server_kills + report.worker_kills == 6
    assert report.server_kills > 0
    assert report.worker_kills > 0
    assert report.is_good, report
