"""The measurement of small budgets runs from end to end; its figures mean nothing on a CPU."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Job
from benchmarks.peers import OFFLOADING
from krea_local import speed
from krea_local.plan import FLUX1, choose

SHORT = shlex.split("--model tiny --device cpu --image-size 64x96 --steps 8 --runs 1")


def here(job: Job, limit: float) -> dict[str, Any]:
    """In this process, since each of its own loads torch again."""
    if job.budget_gb == 8:
        return memory.outcome([sys.executable, "-c", "import os; os.abort()"], limit)
    return memory.work(job)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("results") / "run.jsonl"
    options = [*SHORT, "--budgets", "4", "8", "16", "none", "--levels", "none", "high"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "eight_bit_of", lambda device: torch.float8_e4m3fn)  # emulated
        code = memory.main([*options, "--output", str(output)], start=here)
    return code, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def ours(run: tuple[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [line for line in run[1] if line["engine"].startswith("krea_local:")]


def test_every_budget_is_measured_at_every_level_the_unlimited_first(
    ours: list[dict[str, Any]],
) -> None:
    assert [(line["engine"], line["budget_gb"]) for line in ours] == [
        (f"krea_local:{level}", budget) for level in ("none", "high") for budget in (None, 16, 8, 4)
    ]
    for line in ours:
        assert (line["kind"], line["model"]) == ("memory", "tiny")
        assert (line["width"], line["height"], line["steps"], line["batch"]) == (64, 96, 8, 1)
        assert line["versions"]["torch"] == torch.__version__
        if "failed" in line:
            continue
        assert line["device"] == "cpu"
        assert {"text", "denoise", "decode", "total"} <= set(line["stages"])
        assert 0 < line["seconds_a_step"] < line["seconds"]
        assert line["first_image_seconds"] > 0
        assert line["host_gib"] > 0.1
        assert line["h2d_gb_per_second"] == "a copy to the GPU needs a GPU"
        assert not line.keys() & {"peak_gib", "peak_reserved_gib"}  # a CPU has none of its own
        assert not line["replanned"]
    assert ours[0]["computed_steps"] == 8
    assert ours[4]["computed_steps"] == 6  # the first 4 and the last 2 are always computed
    assert ours[4]["settings"]["eight_bit"] == "float8_e4m3fn"
    assert [line["lossless"] for line in ours if "seconds" in line] == [True] * 3 + [False] * 3


def test_a_budget_stands_for_the_large_models_plan(ours: list[dict[str, Any]]) -> None:
    for line in ours:
        if line["budget_gb"] is None:
            assert (line["offload"], line["streamed_gb_a_step"]) == ("none", 0)
        elif "seconds" in line:
            large = choose(FLUX1, int(line["budget_gb"] * 1e9))
            assert line["offload"] == large.offload
            if line["lossless"]:  # in 8 bits all may stay
                assert line["streamed_gb_a_step"] > 0
    of_16, of_4 = (ours[i]["resident_blocks"] for i in (1, 3))
    assert of_4 < of_16 < ours[1]["blocks"]


def test_the_picture_does_not_change_with_the_budget(ours: list[dict[str, Any]]) -> None:
    limited = [line for line in ours if line["budget_gb"] is not None and "seconds" in line]
    assert len(limited) == 4
    for line in limited:
        assert line["same_latents"]
        assert line["times_unlimited"] > 0
    assert ours[0]["latents_sha256"] != ours[4]["latents_sha256"]  # of another level


def test_a_process_that_dies_is_a_line_with_its_reason(
    run: tuple[int, list[dict[str, Any]]],
) -> None:
    code, lines = run
    assert code == 1
    died = [line for line in lines if line["budget_gb"] == 8]
    assert all(line["failed"] == "the process ended, killed by SIGABRT" for line in died)
    assert "not measured: the process ended, killed by SIGABRT" in memory.table(lines)


def test_every_way_of_diffusers_to_offload_is_measured(
    run: tuple[int, list[dict[str, Any]]],
) -> None:
    lines = [line for line in run[1] if line["engine"].startswith("diffusers:")]
    assert [line["engine"] for line in lines] == [peer.engine for peer in OFFLOADING]
    for line in lines:
        if line["engine"] == "diffusers:sequential-offload":
            assert line["failed"] == "sequential offload needs an NVIDIA GPU"
        else:
            assert line["seconds"] > 0, line
            assert line["lossless"]
    assert memory.NOTES[True] in memory.table(run[1])


def test_ours_is_held_against_their_best_that_takes_as_much() -> None:
    def line(engine: str, budget: float | None, peak: float, seconds: float) -> dict[str, Any]:
        figures = {"peak_gib": peak, "seconds": seconds, "device": "NVIDIA H200"}
        return {"engine": engine, "budget_gb": budget, **figures}

    lines = [
        line("krea_local:none", None, 33, 3),
        line("krea_local:none", 12, 11, 6),
        line("krea_local:none", 4, 3.5, 10),
        line("diffusers:model-offload", None, 24, 21),
        line("diffusers:group-offload-leaves", None, 10, 40),
        line("diffusers:sequential-offload", None, 2.4, 68),
    ]
    text = memory.table(lines)
    rows = [row.split() for row in text.split("\n\n")[1].splitlines()[1:-1]]
    assert [(row[1], row[4], row[-1]) for row in rows] == [
        ("12", "diffusers:model-offload", "3.50"),
        ("4", "diffusers:model-offload", "2.10"),
    ]
    assert "not a small card's seconds" in text


def test_the_floor_is_computing_or_copying_whichever_is_longer() -> None:
    job = Job("krea_local:none", 8, "m", 64, 64, batch=1, steps=28, runs=1, device="", dtype="")
    figures = {
        "latents_sha256": "",
        "seconds": 20.0,
        "h2d_gb_per_second": 20.0,
        "streamed_gb_a_step": 10.0,
        "computed_steps": 14,
        "seconds_a_step": 0.5,
    }
    whole = {"engine": job.engine, "budget_gb": None, "latents_sha256": "", "seconds": 10.0}
    copies = memory.line_of(job, figures, [{**whole, "seconds_a_step": 0.1}])
    assert copies["times_floor"] == pytest.approx(2)  # half of the steps, 0.5 s each
    computes = memory.line_of(job, figures, [{**whole, "seconds_a_step": 0.4}])
    assert computes["times_floor"] == pytest.approx(1.25)
    assert computes["times_unlimited"] == 2
    assert "times_unlimited" not in memory.line_of(job, figures, [])


def test_a_process_of_its_own_prints_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    job = memory.jobs_of(memory_options("--peers"))[0]
    figures = memory.in_a_process(Job(**{**vars(job), "model": "nowhere"}), 900)
    assert figures["failed"].startswith("WeightsNotFound: no model 'nowhere'")
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert memory.outcome(slow, 0.1) == {"failed": "took longer than 0.1 s"}
    wrong = [sys.executable, "-c", "raise SystemExit('no')"]
    assert memory.outcome(wrong, 60) == {"failed": "the process ended, exit status 1: no"}


def memory_options(*arguments: str) -> Any:
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "jobs_of", lambda options: seen.append(options) or [])
        memory.main([*SHORT, *arguments])
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "-4"], "invalid budget value"),
        (["--peers", "diffusers:eager"], "invalid choice"),
        (["--image-size", "banana"], "WIDTHxHEIGHT"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        memory.main([*SHORT, *arguments])
    assert message in capsys.readouterr().err


def test_a_file_of_results_is_never_written_over(tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    output.write_text("precious")
    with pytest.raises(SystemExit):
        memory.main([*SHORT, "--output", str(output)])
    assert output.read_text() == "precious"
