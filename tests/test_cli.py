from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import krea_local
from krea_local import cli, weights
from krea_local.recipe import read_recipe, with_recipe
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest

ROOT = Path(__file__).parents[1]
QUICK = ["--image-size", "64x64", "--num-inference-steps", "1"]


@pytest.fixture(autouse=True)
def one_model(krea: krea_local.Krea, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Commands run in this process, in an empty folder, on the loaded tiny model."""
    loads: list[Any] = []

    def load(model: str | None, **options: Any) -> krea_local.Krea:
        loads.append((model, options))
        return krea

    monkeypatch.setattr(krea_local.api, "load", load)
    monkeypatch.setattr(cli, "_has_no_weights", lambda: False)
    monkeypatch.chdir(tmp_path)
    return loads


has_no_weights = cli._has_no_weights


@pytest.mark.parametrize("more", [[], ["--quiet"]])
def test_without_weights_the_miniature_draws_and_says_so(
    more: list[str],
    one_model: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise krea_local.WeightsNotFound("not in the hub's cache")

    monkeypatch.setattr(cli, "_has_no_weights", has_no_weights)
    monkeypatch.setattr(weights, "find_on_hub", nothing)
    assert cli.main(["txt2img", "a red square", "--json", *more, *QUICK]) == 0
    assert one_model[-1][0] == "mini"
    answer, said = capsys.readouterr()
    assert "no weights of FLUX.1 Krea [dev] here yet" in said
    assert "`krea-local download` fetches the real model" in said
    assert any("miniature" in notice for notice in json.loads(answer)["notices"])
    # Whoever names a model gets that or an error.
    assert cli.main(["txt2img", "a red square", "--model", "krea", *QUICK]) == 0
    monkeypatch.setenv("KREA_LOCAL_MODEL", "krea")
    assert cli.main(["txt2img", "a red square", *QUICK]) == 0
    assert [model for model, _ in one_model[-2:]] == ["krea", None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [None, "txt2img", "img2img", "download", "verify", "tiny", "info"])
def test_help_comes_at_once_and_without_torch(name: str | None) -> None:
    arguments = [*([name] if name else []), "--help"]
    code = (
        "import sys; from krea_local.cli import main; "
        f"code = main({arguments!r}); heavy = {{'torch', 'numpy', 'diffusers'}}; "
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.stderr.strip() == "0 []"
    assert "exit codes" in answer.stdout


@pytest.mark.parametrize(
    ("name", "request_"), [("txt2img", Txt2ImgRequest), ("img2img", Img2ImgRequest)]
)
def test_flags_are_the_fields_with_their_help_and_bounds(
    name: str, request_: type[Txt2ImgRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field_name, field in request_.model_fields.items():
        if field_name not in cli.NOT_FLAGS:
            assert "--" + field_name.replace("_", "-") in text
            assert str(field.description) in text
    assert "(1 … 20; default: 4.5; 3.5 for FLUX.1 [dev])" in text
    assert "--no-enable-safety-checker" in text


def test_a_picture_is_drawn_to_the_named_file(
    one_model: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        ["txt2img", "a red fox", "--model", "tiny", "--seed", "7", "--output", "fox.jpeg", *QUICK]
    )
    assert code == 0
    assert capsys.readouterr() == ("fox.jpeg\n", "")
    with Image.open("fox.jpeg") as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    assert read_recipe("fox.jpeg")["seed"] == 7
    assert one_model == [("tiny", {"progress": True, "group": None})]


def test_options_of_the_model_are_passed_on(one_model: list[Any]) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--offload", "model", "--engine", "native"]
    checker = ["--safety-checker", "x", "--safety-threshold", "0.85", "--quiet", "--compile"]
    assert cli.main(["txt2img", "a", *options, *checker, *QUICK]) == 0
    assert one_model[0] == (
        None,
        {
            "progress": False,
            "group": None,
            "device": "cpu",
            "dtype": "float32",
            "offload": "model",
            "engine": "native",
            "compile": True,
            "safety_checker": "x",
            "safety_threshold": 0.85,
        },
    )


def test_files_are_named_after_the_prompt_and_several_after_their_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["txt2img", "a red fox", "--seed", "7", *QUICK]) == 0
    assert cli.main(["txt2img", "a red fox", "--seed", "7", *QUICK]) == 0
    several = ["--num-images", "2", "--seed", "3"]
    assert cli.main(["txt2img", "x", *several, "--output", "fox.png", *QUICK]) == 0
    assert cli.main(["txt2img", "x", *several, "--output", "new/folder/", *QUICK]) == 0
    assert capsys.readouterr().out.split() == [
        "a-red-fox-7.jpeg",
        "a-red-fox-7-2.jpeg",
        "fox-3.png",
        "fox-4.png",
        "new/folder/x-3.jpeg",
        "new/folder/x-4.jpeg",
    ]
    with Image.open("fox-3.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("folder", [".", "pics.2024", "pics.2024/", "new.folder/", "new"])
def test_folders_of_any_name_are_folders(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pics.2024").mkdir()
    assert cli.main(["txt2img", "x", "--seed", "1", "--output", folder, *QUICK]) == 0
    assert (Path(folder) / "x-1.jpeg").exists()
    assert len(list(Path().rglob("*.jpeg"))) == 1


def test_the_file_of_several_prompts_is_not_overwritten_by_each() -> None:
    Path("prompts").write_text("one\ntwo\nthree\n")
    several = ["--prompts", "prompts", "--seed", "1", "--output", "new/fox.png"]
    assert cli.main(["txt2img", *several, *QUICK]) == 0
    names = sorted(path.name for path in Path("new").iterdir())
    assert names == ["fox-1-2.png", "fox-1-3.png", "fox-1.png"]
    prompts = {read_recipe(path)["prompt"] for path in Path("new").iterdir()}
    assert prompts == {"one", "two", "three"}


def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    one_model: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    for output in ("file/fox.png", "file/folder/", "~nobody-of-this-name/x.png"):
        assert cli.main(["txt2img", "x", "--output", output, *QUICK]) in (1, 2)
        assert output.split("/")[0] in capsys.readouterr().err
    assert one_model == []


def test_an_unexpected_error_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(krea_local.api, "load", load)
    assert cli.main(["txt2img", "a"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("krea-local: unexpected ZeroDivisionError: by zero; KREA_LOCAL_DEBUG=1")
    monkeypatch.setenv("KREA_LOCAL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["txt2img", "a"])


def test_json_is_one_line_with_the_apis_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["txt2img", "a", "--json", "--seed", "1", "--image-size", "70x64", *QUICK[2:]])
        == 0
    )
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert answer["seed"] == 1
    assert answer["model"] == "tiny"
    (image,) = answer["images"]
    assert image["file"] == "a-1.jpeg"
    assert image["url"] == Path("a-1.jpeg").absolute().as_uri()
    assert (image["width"], image["height"]) == (64, 64)
    assert "70x64 was rounded to 64x64" in answer["notices"][0]
    assert err == f"krea-local: note: {answer['notices'][0]}\n"


def test_quiet_silences_notices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["txt2img", "a", "--quiet", "--image-size", "70x64", *QUICK[2:]]) == 0
    assert capsys.readouterr().err == ""


def test_prompts_come_from_a_file_or_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("a fox\n\n  a cat, 狐  \n", encoding="utf-8")
    assert cli.main(["txt2img", "--prompts", "prompts.txt", "--seed", "1", *QUICK]) == 0
    assert capsys.readouterr().out.split() == ["a-fox-1.jpeg", "a-cat-狐-1.jpeg"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert cli.main(["txt2img", "--prompts", "-", "--json", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two"]


def test_a_picture_is_repeated_from_its_file(
    capsys: pytest.CaptureFixture[str], one_model: list[Any]
) -> None:
    first = ["--seed", "7", "--num-images", "2", "--guidance-scale", "3", "--image-size", "64x96"]
    assert (
        cli.main(["txt2img", "a fox", *first, "--num-inference-steps", "2", "--output", "a.png"])
        == 0
    )
    assert cli.main(["txt2img", "--from", "a-8.png", "--output", "b.png"]) == 0
    assert Path("b.png").read_bytes() == Path("a-8.png").read_bytes()
    assert one_model[-1][0] == "tiny"
    changed = ["--from", "a-8.png", "a wizard", "--seed", "9", "--output", "c.png"]
    assert cli.main(["txt2img", *changed]) == 0
    assert read_recipe("c.png") == {**read_recipe("b.png"), "prompt": "a wizard", "seed": 9}
    assert capsys.readouterr().err == ""


def test_a_strangers_recipe_fetches_no_model(
    capsys: pytest.CaptureFixture[str], one_model: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from krea_local import weights

    asked: list[str] = []
    original = weights.snapshot

    def snapshot(repo: str, *arguments: Any, local_files_only: bool, **options: Any) -> Path:
        asked.append(repo)
        assert local_files_only
        return original(repo, *arguments, local_files_only=local_files_only, **options)

    monkeypatch.setattr(weights, "snapshot", snapshot)
    image = Image.new("RGB", (64, 64))
    base = {"prompt": "x", "num_inference_steps": 1, "guidance_scale": 4.5, "seed": 1}
    for model in ("someone/else", weights.KREA.repo, "/etc", ["tiny"]):
        recipe = {**base, "width": 64, "height": 64, "model": model, "version": "?"}
        with_recipe(image.copy(), recipe).save("stranger.png")
        assert cli.main(["txt2img", "--from", "stranger.png", *QUICK]) == 0
        assert one_model[-1][0] is None  # the user's own default
        assert f"was made with {model}, this is tiny" in capsys.readouterr().err
    assert asked == [weights.KREA.repo]


def test_a_strangers_recipe_does_not_switch_the_filter_off(
    krea: krea_local.Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krea._checker(), "threshold", 0.0)
    off = ["--no-enable-safety-checker"]
    assert cli.main(["txt2img", "a", "--output", "a.png", *off, *QUICK]) == 0
    assert cli.main(["txt2img", "--from", "a.png", "--output", "b.png"]) == 5
    assert cli.main(["txt2img", "--from", "a.png", "--output", "c.png", *off]) == 0
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()


def test_a_redrawn_picture_is_repeated_given_the_same_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.radial_gradient("L").resize((64, 64)).save("in.png")
    Image.new("RGB", (64, 64), "teal").save("other.png")
    steps = ["--num-inference-steps", "10", "--strength", "0.5", "--seed", "3"]
    assert cli.main(["img2img", "a fox", "--image-url", "in.png", *steps, "--output", "a.png"]) == 0
    again = ["img2img", "--from", "a.png", "--output", "b.png"]
    assert cli.main([*again, "--image-url", "in.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert capsys.readouterr().err == ""
    assert cli.main(again) == 2
    assert "redrew in.png; give that as --image-url" in capsys.readouterr().err
    assert cli.main([*again, "--image-url", "other.png"]) == 0
    assert "other.png is not the image that a.png was made from" in capsys.readouterr().err
    assert cli.main(["txt2img", "--from", "a.png"]) == 2
    assert "was made by img2img; use krea-local img2img" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["draw"], 2, "invalid choice: 'draw'"),
        (["txt2img"], 2, "a PROMPT is required, or --prompts FILE, or --from PICTURE"),
        (["txt2img", "a", "--steps", "3"], 2, "unrecognized arguments: --steps 3"),
        (["txt2img", "a", "--num-images", "9"], 2, "num_images='9': should be less than or equal"),
        (["txt2img", "a", "--seed", "x"], 2, "seed='x': should be a valid integer"),
        (
            ["txt2img", "a", "--guidance-scale", "nan"],
            2,
            "guidance_scale='nan': should be a finite",
        ),
        (["txt2img", "a", "--image-size", "9x9"], 2, "image_size.width='9': should be greater"),
        (
            ["txt2img", "a", "--image-size", "huge"],
            2,
            "image_size='huge': should be like 1024x768, or",
        ),
        (["txt2img", "a", "--image-size", "4000x4000"], 2, "the nearest that fits is 2048x2048"),
        (["txt2img", "a", "--output", "a.gif"], 2, "should be a .jpeg or .png file, or a folder"),
        (
            ["txt2img", "a", "--output", "a.png", "--output-format", "jpeg"],
            2,
            "--output a.png: ends in .png, not .jpeg",
        ),
        (["txt2img", "a", "--prompts", "x"], 2, "a PROMPT or --prompts, not both"),
        (
            ["txt2img", "--prompts", "nothing.txt"],
            2,
            "--prompts nothing.txt: cannot be read: No such",
        ),
        (["txt2img", "--prompts", os.devnull], 2, "holds no prompts"),
        (["txt2img", "--from", "nothing.png"], 2, "'nothing.png': cannot be read"),
        (["img2img", "a"], 2, "image_url: is required"),
        (
            ["img2img", "a", "--image-url", "nothing.png"],
            2,
            "cannot read 'nothing.png': No such file",
        ),
        (
            ["txt2img", "a", "--output", "/proc/x/y.png", *QUICK],
            1,
            "cannot make the folder '/proc/x'",
        ),
        (["tiny", "/proc/x/y"], 1, "cannot write '/proc/x/y'"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("krea-local")
    assert message in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (krea_local.InvalidImage, 2),
        (krea_local.WeightsNotFound, 3),
        (krea_local.LicenceRequired, 3),
        (krea_local.UnsupportedModel, 3),
        (krea_local.DeviceUnavailable, 4),
        (krea_local.OutOfMemory, 4),
        (krea_local.GenerationFailed, 1),
        (krea_local.Cancelled, 130),
        (KeyboardInterrupt, 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error("so it is")

    monkeypatch.setattr(krea_local.api, "load", load)
    assert cli.main(["txt2img", "a"]) == code


def test_a_screen_that_cannot_show_everything_is_no_reason_to_fail() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-m", "krea_local", "--help"]
    plain = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert (plain.returncode, plain.stderr) == (0, "")


def test_output_that_cannot_be_printed_is_told_without_a_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["txt2img", "a", *QUICK]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "krea-local: [Errno 28] No space left on device"


def test_being_terminated_tidies_up_and_tells_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tidied: list[bool] = []

    def load(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            tidied.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(krea_local.api, "load", load)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["txt2img", "a"])
    assert tidied == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_prompts_files_of_all_makes_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("windows.txt").write_bytes("\ufeffred fox\r\ngreen fox\r\n".encode())
    assert cli.main(["txt2img", "--prompts", "windows.txt", "--json", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["red fox", "green fox"]
    Path("binary").write_bytes(bytes(range(256)))
    assert cli.main(["txt2img", "--prompts", "binary", *QUICK]) == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["txt2img", "--prompts", "-", *QUICK]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_what_a_file_says_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"prompt": "x", "num_inference_steps": 1, "guidance_scale": 4.5, "seed": 1}
    recipe |= {"width": 64, "height": 64, "model": "tiny", "version": "\x1b]0;owned\x07\n"}
    with_recipe(Image.new("RGB", (64, 64)), recipe).save("x.png")
    assert cli.main(["txt2img", "--from", "x.png", *QUICK]) == 0
    err = capsys.readouterr().err
    assert "owned" in err
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


def test_json_tells_errors_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["txt2img", "a", "--json", "--num-images", "9"]) == 2
    fault = json.loads(capsys.readouterr().out)["error"]
    assert fault["type"] == "InvalidRequest"
    assert fault["exit_code"] == 2
    assert "num_images" in fault["message"]


def test_filtered_and_partly_failed_have_their_exit_codes(
    krea: krea_local.Krea, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(krea._checker(), "threshold", 0.0)
    assert cli.main(["txt2img", "a", *QUICK]) == 5
    assert "(filtered by the safety checker: black)" in capsys.readouterr().out
    assert cli.main(["txt2img", "a", "--no-enable-safety-checker", *QUICK]) == 0
    Path("prompts").write_text("good\nbad\ngood\n")
    Path("bad").write_text("bad\nbad\n")
    original = krea_local.Krea.run

    def run(self: krea_local.Krea, request: Txt2ImgRequest, **options: Any) -> Any:
        if request.prompt == "bad":
            raise krea_local.GenerationFailed("NaN")
        return original(self, request, **options)

    monkeypatch.setattr(krea_local.Krea, "run", run)
    safe = ["--no-enable-safety-checker", *QUICK]
    assert cli.main(["txt2img", "--prompts", "prompts", *safe]) == 6
    assert len(list(Path().glob("good-*.jpeg"))) == 2
    assert cli.main(["txt2img", "--prompts", "bad", *safe]) == 1


def test_tiny_writes_a_checkpoint_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tiny", "checkpoint"]) == 0
    assert capsys.readouterr().out == "checkpoint\n"
    assert (Path("checkpoint") / "model_index.json").exists()
    assert cli.main(["tiny", "checkpoint"]) == 1
    assert "is not an empty folder" in capsys.readouterr().err


def test_info_tells_versions_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("krea_local", "torch", "diffusers", "GPU", "model", "safety_checker"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["krea_local"] == krea_local.__version__
    assert isinstance(facts["gpus"], list)


def test_the_real_command_draws_and_then_answers_ctrl_c_with_130(tmp_path: Path) -> None:
    """On a terminal, so that the progress bar is there; then interrupted while it denoises."""
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "krea_local", "txt2img", "--prompts", "-", "--model", "tiny"),
            *("--image-size", "256x256", "--num-inference-steps", "50", "--output", "out/"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=other_end,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    os.close(other_end)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.close()
    assert process.stdout.readline().startswith(b"out/one-")  # the first is done, the second runs
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    shown = b""
    while True:
        try:
            block = os.read(terminal, 10_000)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    process.stdout.close()
    assert b"denoise" in shown
    assert b"interrupted" in shown
    assert b"Traceback" not in shown
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".jpeg"]
