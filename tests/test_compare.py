"""The comparison runs from end to end with the tiny model; its figures mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.peers import PEERS
from krea_local.speed import LEVELS
from krea_local.transformer import Config

SIZE = ["--sizes", "64x96", "--main-size", "64x96"]
SHORT = ["--model", "tiny", "--device", "cpu", *SIZE, "--steps", "8", "--runs", "1"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("results") / "run.jsonl"
    options = [*SHORT, "--batches", "1", "2", "--ceiling-seconds", "0.01", "--engines"]
    engines = [*(f"krea_local:{level}" for level in LEVELS), "diffusers:eager", "diffusers:cudnn"]
    emulated = ["--eight-bit", "int8"]
    assert compare.main([*options, *engines, *emulated, "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


def test_every_level_and_size_and_batch_is_measured_with_its_stages(
    lines: list[dict[str, Any]],
) -> None:
    ours = [line for line in of(lines, "latency") if line["engine"].startswith("krea_local")]
    assert [(line["engine"], line["batch"]) for line in ours] == [
        (f"krea_local:{level}", batch) for level in LEVELS for batch in (1, 2)
    ]
    for line in ours:
        assert {"text", "denoise", "decode", "total"} <= set(line["stages"])
        assert line["tflops"] > 0
        assert line["first_image_seconds"] > 0
        assert (line["width"], line["height"], line["steps"]) == (64, 96, 8)
        assert line["versions"]["torch"] == torch.__version__
    assert [line["settings"]["eight_bit"] for line in ours] == [None] * 2 + ["int8"] * 4
    assert ours[-1]["settings"]["skipping"]["computed"] == 0.5


def test_exactness_is_measured_against_float32(lines: list[dict[str, Any]]) -> None:
    errors = {line["engine"]: line["relative_error"] for line in of(lines, "exactness")}
    assert errors.pop("diffusers:eager") < 1e-5
    assert errors.pop("krea_local:plain-torch") < 1e-5
    assert errors.pop("krea_local:none") < 1e-5
    assert 1e-4 < errors.pop("krea_local:regular") < 0.1
    assert not errors


def test_the_waterfall_adds_one_step_at_a_time(lines: list[dict[str, Any]]) -> None:
    added = [line["added"] for line in of(lines, "waterfall")]
    assert added[1:] == [step.name for step in LEVELS["high"]]
    lossless = [line["lossless"] for line in of(lines, "waterfall")]
    assert lossless == [True, *(step.lossless for step in LEVELS["none"]), False, False]


def test_a_peer_that_cannot_run_here_says_why(lines: list[dict[str, Any]]) -> None:
    peers = [line for line in of(lines, "latency") if line["engine"].startswith("diffusers")]
    assert [line["engine"] for line in peers] == ["diffusers:eager"] * 2 + ["diffusers:cudnn"]
    assert "seconds" in peers[0]
    if not torch.cuda.is_available():
        assert peers[2]["failed"] == "cuDNN's attention needs an NVIDIA GPU"
    text = compare.table(lines)
    assert "not measured: cuDNN's attention needs an NVIDIA GPU" in text
    assert "1.00" in text.split("diffusers:eager")[-1]  # of itself


def test_every_operation_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from benchmarks import kernels

    options = "--image-tokens 3 --text-tokens 1 --heads 1 --seconds 0"
    assert kernels.main(options.split()) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    seen = {(one["operation"], one["engine"]) for one in line["operations"]}
    assert {("gelu", "torch"), ("gelu", "triton"), ("quantize 8-bit", "triton")} <= seen
    sweeps = {one["parameter"] for one in line["operations"] if one["operation"] == "gelu"}
    assert sweeps == {None, *(f"NUMBERS_A_THREAD={value}" for value in (16, 32, 64))}
    assert all(one["microseconds"] > 0 for one in line["operations"])


def test_the_plot_is_a_picture(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    source = tmp_path / "run.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot.main([str(source)]) == 0
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    source.write_text("")
    with pytest.raises(SystemExit):
        plot.main([str(source)])


def test_a_file_of_results_is_never_written_over(tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    output.write_text("precious")
    with pytest.raises(SystemExit):
        compare.main([*SHORT, "--output", str(output)])
    assert output.read_text() == "precious"


@pytest.mark.parametrize(
    ("size", "message"), [("100x96", "multiples of 16"), ("banana", "WIDTHxHEIGHT")]
)
def test_a_size_that_cannot_be_drawn_is_refused_at_once(
    size: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--model", "nowhere", "--sizes", size])
    assert message in capsys.readouterr().err


def test_a_part_that_fails_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: compare.Run) -> None:
        raise AssertionError

    monkeypatch.setitem(compare.PARTS, "ours", fails)
    monkeypatch.setitem(compare.PARTS, "ceilings", lambda run: run.write("ceilings"))
    assert compare.main([*SHORT, "--parts", "ours", "ceilings"]) == 1
    lines = [json.loads(one) for one in capsys.readouterr().out.splitlines() if one[:1] == "{"]
    assert [line["kind"] for line in lines] == ["part", "ceilings"]
    assert lines[0]["failed"] == "AssertionError: "


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main([*SHORT, "--engines", "diffusers:slow"])
    assert "should be one of" in capsys.readouterr().err


def test_operations_are_counted_as_published() -> None:
    linears, attention = compare.forward_tflop(Config(), 4096)
    assert linears == pytest.approx(59.5, abs=0.1)
    assert attention == pytest.approx(14.9, abs=0.1)


def test_every_engine_has_a_name_of_its_own() -> None:
    assert len({peer.engine for peer in PEERS}) == len(PEERS)
