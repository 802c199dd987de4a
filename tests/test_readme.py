"""The README tells the truth: its commands and programs run, its table is the schema."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import krea_local
from benchmarks.lora import write_lora
from krea_local import Img2ImgRequest, Txt2ImgRequest, cli, fetching
from krea_local.schema import PRESETS
from krea_local.weights import FAMILIES

ROOT = Path(__file__).parents[1]
REAL_LOAD = krea_local.load
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def small_model(
    krea: krea_local.Krea,
    no_models_kept: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What the README does with the 12 B model on a GPU is done here with the tiny one."""
    monkeypatch.setattr(krea_local, "load", lambda *_, **__: krea)
    monkeypatch.setattr(krea_local.api, "load", lambda *_, **__: krea)
    monkeypatch.setenv("KREA_LOCAL_MODEL", "tiny")
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)


def test_the_two_commands_install_then_draw_and_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krea_local.api, "load", REAL_LOAD)  # the miniature is quick enough
    draw, test = blocks("sh")[:2]
    for command in (draw, test):
        assert command.count("\n") == 1  # one command each
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    arguments = shlex.split(draw.rsplit("&&", 1)[1])
    assert arguments[0] == ".venv/bin/krea-local"
    # Fewer steps, only to save time: .ci/run runs the two commands as they stand there.
    assert cli.main([*arguments[1:], "--num-inference-steps", "4"]) == 0
    with Image.open("scene.jpeg") as scene:
        assert scene.size == PRESETS["landscape_4_3"]
        assert scene.getpixel((5, 5)) == pytest.approx((250, 250, 247), abs=12)  # white
    assert test.rstrip().endswith(" -m pytest -n logical --maxprocesses 4 --dist loadfile")


def test_the_python_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, twin, _ = blocks("python")
    names: dict[str, Any] = {}
    # Fewer steps, only to save time.
    exec(first.replace("seed=7)", "seed=7, num_inference_steps=2)"), names)
    assert Path("fox.png").exists()
    with Image.open("fox.png") as fox:
        fox.resize((256, 192)).save("fox.png")
    exec(second.replace("num_images=2)", "num_images=2, num_inference_steps=10)"), names)
    assert len(list(Path("pictures").glob("the-same-fox-at-dusk-*.jpeg"))) == 2
    assert len(list(Path("out").iterdir())) == 2
    exec(twin.replace('fox"}', 'fox", "num_inference_steps": 1}'), names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("file://")


def test_the_command_lines_run(
    krea: krea_local.Krea, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, object]] = []

    def plan(model: str, **options: object) -> fetching.Plan:  # tests fetch nothing
        fetched.append((model, options["folder"]))
        return fetching.Plan((FAMILIES[0], FAMILIES[0].repo), None, True, None, (), (), ())

    monkeypatch.setattr(fetching, "plan", plan)
    monkeypatch.setattr(fetching, "fetch", lambda planned, **_: None)
    Path("prompts.txt").write_text("one\ntwo\n")
    (section,) = (block for block in blocks("sh") if "krea-local info" in block)
    lines = [line for line in section.splitlines() if line]
    assert len(lines) == 11
    write_lora(krea, 2, Path("style.safetensors"))
    for line in lines:
        arguments = shlex.split(line, comments=True)
        assert arguments.pop(0) == "krea-local"
        if arguments == ["serve"]:  # would not end; tests of its own start it
            continue
        fewest = {"txt2img": "1", "img2img": "10"}
        if arguments[0] in fewest:
            arguments += ["--num-inference-steps", fewest[arguments[0]]]  # only to save time
        assert cli.main(arguments) == 0, line
        said = capsys.readouterr().err
        assert said == "" or arguments[0] in ("download", "verify", "convert")
    assert fetched == [("krea", None)]


def test_the_parameter_table_is_the_schema() -> None:
    rows = {}
    for line in README.split("## Parameters")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].startswith("`"):
            rows[cells[0].split("`")[1]] = cells
    both = {**Img2ImgRequest.model_fields, **Txt2ImgRequest.model_fields}
    assert set(rows) == set(both)
    for name, field in both.items():
        label, default, limits, meaning = rows[name]
        assert meaning == field.description
        in_both = name in Img2ImgRequest.model_fields and name in Txt2ImgRequest.model_fields
        assert ("img" in label) != in_both
        if field.is_required():
            assert default == "required"
        elif field.default is not None:
            shown = str(field.default).lower() if field.annotation is bool else str(field.default)
            shown = "[]" if field.default == () else shown
            assert default.split(",")[0].strip("`") == shown
        for rule in field.metadata if name != "seed" else ():  # written as powers of two
            for end in ("ge", "le"):
                if hasattr(rule, end):
                    assert str(getattr(rule, end)) in limits
    steps = Img2ImgRequest.model_fields["num_inference_steps"]
    assert f"img2img {steps.default}" in rows["num_inference_steps"][1]
    assert "img2img 10 … 50" in rows["num_inference_steps"][2]
    assert f"FLUX.1 [dev] {FAMILIES[1].guidance_scale}" in rows["guidance_scale"][1]


def test_the_presets_and_exit_codes_are_told() -> None:
    text = " ".join(README.split())
    for preset, (width, height) in PRESETS.items():
        assert f"`{preset}` {width}×{height}" in text
    for code in (cli.OK, cli.FAILED, cli.USAGE, cli.WEIGHTS, cli.GPU, cli.FILTERED):
        assert re.search(rf"[ ,:]{code} ", text.split("Exit codes:")[1][:200])


def test_the_documents_name_every_model_and_file() -> None:
    weights = (ROOT / "weights.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"| `{family.alias}` | {family.repo}" in weights
        assert f"| {family.guidance_scale} |" in weights
        assert family.name in README
    for folder in krea_local.weights.FOLDERS:
        assert f"{folder}/" in weights
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {krea_local.__version__}" in changes


def test_every_step_of_every_level_is_told() -> None:
    from krea_local.speed import LEVELS

    for steps in LEVELS.values():
        for step in steps:
            assert f"`{step.name}`" in README


def test_the_footprints_are_told_as_computed() -> None:
    from krea_local.memory import OFFLOADS
    from krea_local.plan import need

    for text in (README, (ROOT / "weights.md").read_text(encoding="utf-8")):
        for gib in map(need, OFFLOADS):
            assert f"{gib:.1f} GiB" in text
    assert "not yet measured" in README


def test_what_packed_files_need_is_what_plans_count() -> None:
    from benchmarks.random_model import sizes_of
    from krea_local.plan import FLUX1, GIB, Plan, options

    table = README.split("**Files of fewer bits need less of both.**")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    files = {
        "bfloat16": (FLUX1, 16.0),
        "8-bit floats, bfloat16": (sizes_of("float8"), 16.0),
        "8-bit floats, 8-bit floats": (sizes_of("float8"), 8.0),
        "Q4_K, Q8_0": (sizes_of("Q4_K"), 8.5),
    }
    assert [row[0] for row in rows] == list(files)
    for name, *said in rows:
        sizes, t5_bits = files[name]
        t5_blocks = tuple(int(size * t5_bits / 16) for size in sizes.t5_blocks)
        plans = list(options(Plan(dataclasses.replace(sizes, t5_blocks=t5_blocks))))
        streamed = [plan for plan in plans if plan.offload == "blocks"]
        counted = (
            min(plan.peak for plan in streamed if not plan.streamed),
            min(plan.peak for plan in plans),
            streamed[0].host,
        )
        assert said == [f"{count / GIB:.1f} GiB" for count in counted], name
