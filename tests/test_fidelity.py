from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import fidelity
from benchmarks import metrics as figures
from benchmarks import sheet as sheets
from benchmarks.fidelity import Plan, Shot
from benchmarks.metrics import Metric
from krea_local import KreaError, WeightsInvalid, WeightsNotFound, speed
from krea_local.pipeline import Krea
from krea_local.skipping import Skipping, StepCache

CPU = torch.device("cpu")
PROMPTS = ("a red fox in fresh snow", "a long prompt about a café " + "and much else " * 40)


@dataclasses.dataclass
class Run:
    """What one call of the benchmark left behind."""

    code: int
    printed: list[str]
    result: dict[str, Any]
    folder: Path

    @property
    def table(self) -> str:
        return "\n".join(self.printed[:-1])

    def level(self, name: str) -> dict[str, Any]:
        return next(level for level in self.result["levels"] if level["acceleration"] == name)


def run(folder: Path, *options: str, model: object = "tiny") -> Run:
    """The benchmark over PROMPTS at 64x64 on the CPU, in this process."""
    prompts = folder / "prompts.txt"
    prompts.write_text("# two\n\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
    arguments = [str(model), "--prompts", str(prompts), "--image-size", "64x64", "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = fidelity.main([*arguments, *options])
    printed = out.getvalue().splitlines()
    return Run(code, printed, json.loads(printed[-1]), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Run:
    """All levels, emulated, with a sheet; steps are skipped whatever the first block says."""
    folder = tmp_path_factory.mktemp("fidelity")
    files = ["--sheet", str(folder / "sheet.png"), "--output", str(folder / "results.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "Skipping", functools.partial(Skipping, threshold=9.0))
        before = speed.eight_bit_of
        done = run(folder, "--steps", "10", "--emulate", "float8", *files, model=tiny_folder)
        assert speed.eight_bit_of is before
    return done


@pytest.fixture
def loaded(krea: Krea, monkeypatch: pytest.MonkeyPatch) -> Krea:
    """Runs use the session's model, which has no 8-bit floats."""
    monkeypatch.setattr(fidelity, "krea_of", lambda *arguments: krea)
    return krea


def test_the_last_line_is_json_with_the_keys_of_the_latency_benchmark(whole: Run) -> None:
    assert whole.code == 0
    assert (whole.folder / "results.jsonl").read_text() == whole.printed[-1] + "\n"
    result = whole.result
    assert (result["width"], result["height"], result["steps"]) == (64, 64, 10)
    assert (result["device"], result["dtype"], result["offload"]) == ("cpu", "float32", "none")
    assert result["versions"]["torch"] == torch.__version__
    assert (result["prompts"], result["prompts_asked"], result["seeds"]) == (2, 2, 1)
    assert result["emulated"] == "float8"
    assert result["stopped"] is None
    engines = [level["engine"] for level in result["levels"]]
    assert engines == ["krea_local:none", "krea_local:regular", "krea_local:high"]
    assert all(level["seconds"] > 0 and level["notices"] == [] for level in result["levels"])


def test_each_level_is_told_from_none(whole: Run) -> None:
    none, regular, high = (whole.level(name) for name in ("none", "regular", "high"))
    assert none["metrics"] == {}
    assert none["speedup"] == 1
    for level in (regular, high):
        for name in ("psnr", "ssim"):
            figures = level["metrics"][name]
            assert figures["worst"] <= figures["median"] == pytest.approx(figures["mean"])
            assert figures["worst_prompt"] in {prompt.strip() for prompt in PROMPTS}
            assert figures["worst_seed"] == 0
    # Steps left out change more than rounding does.
    assert 30 < high["metrics"]["psnr"]["mean"] < regular["metrics"]["psnr"]["mean"] < 80
    assert high["metrics"]["ssim"]["mean"] < regular["metrics"]["ssim"]["mean"] < 1


def test_steps_are_counted_that_a_level_skips(whole: Run) -> None:
    # Of 10 steps the first 4 and the last 2 are computed, and one after three in a row.
    assert [whole.level(one)["steps_skipped"] for one in ("none", "regular")] == [None, None]
    assert whole.level("high")["steps_skipped"] == pytest.approx(3 / 10)


def test_every_lossy_step_of_every_level_is_known(whole: Run) -> None:
    for level in whole.result["levels"]:
        assert level["left_out"] == []
        assert level["lossy_steps"] == [
            step.name for step in speed.LEVELS[level["acceleration"]] if not step.lossless
        ]


def test_the_table_says_what_was_measured_and_why_not_all(whole: Run) -> None:
    for words in (
        "cpu, float8 emulated",
        "2 prompts x 1 seeds, 64x64, 10 steps",
        "30%",
        "PSNR, dB",
        "SSIM",
        "not measured    CLIP score: --clip FOLDER names no CLIP model",
        "not measured    ImageReward: --image-reward PATH names no weights",
    ):
        assert words in whole.table
    assert all(len(line) <= 120 for line in whole.printed[:-1] if "not measured" not in line)


def test_the_sheet_has_a_row_a_prompt_and_a_column_a_picture(whole: Run) -> None:
    path = whole.folder / "sheet.png"
    assert sorted(file.name for file in whole.folder.iterdir()) == [
        "prompts.txt",
        "results.jsonl",
        "sheet.png",
    ]
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        sheet.load()
        row = sheets.CAPTION + 256 + sheets.FIGURES + sheets.BETWEEN
        gaps = 4 * sheets.GAP + 2 * sheets.GAP  # between five columns, and around groups
        assert sheet.size == (2 * sheets.MARGIN + 5 * 256 + gaps, sheets.HEAD + 2 * row)
        pixels = np.asarray(sheet.convert("RGB"))
    assert b"trainedAlgorithmicMedia" in path.read_bytes()
    first = pixels[sheets.HEAD + sheets.CAPTION :][:256]
    left = sheets.MARGIN + np.array([0, 1, 2, 3, 4]) * (256 + sheets.GAP)
    none, regular, rounding, high, skipping = (
        first[:, x : x + 256] for x in left + np.array([0, 1, 1, 2, 2]) * sheets.GAP
    )
    assert len(np.unique(none)) > 100  # a picture
    assert 0 < np.abs(none.astype(int) - regular).mean() < np.abs(none.astype(int) - high).mean()
    assert 0 < rounding.mean() < skipping.mean()
    caption = pixels[sheets.HEAD + 1 :][: sheets.CAPTION - 1]
    assert caption.min() < 100  # the prompt, in dark letters
    margin = pixels[:, -sheets.MARGIN :]
    assert margin.min() == 255  # cut where the sheet ends


def test_a_narrow_picture_has_room_for_two_lines_of_figures(whole: Run) -> None:
    thumbnail = Image.new("RGB", (144, 256))
    score = {"clip_score": 31.2, "image_reward": -1.037}
    near = {"psnr": math.inf, "ssim": 1.0, "lpips": 0.0512}
    figures = {"none": score, "regular": near | score, "high": near | score}
    drawn = [
        Shot("a fox", 0, level, 1.0, 13 if level == "high" else None, (576, 1024), (), one)
        for level, one in figures.items()
    ]
    assert sheets._captions(drawn[2], 28) == [
        "equal to none,  SSIM 1.000,  LPIPS 0.05120,  13 of 28 steps skipped",
        "CLIP score 31.20,  ImageReward -1.037",
    ]
    row = fidelity.Row("a fox", tuple(drawn), (thumbnail,) * 5)
    sheet = sheets.contact_sheet(whole.result, [row])
    assert sheet.size == (
        2 * sheets.MARGIN + 5 * 224 + 6 * sheets.GAP,
        sheets.HEAD + sheets.CAPTION + 256 + 2 * sheets.FIGURES + sheets.BETWEEN,
    )


def test_where_a_level_cannot_run_pictures_are_equal_and_goals_are_not_judged(
    loaded: Krea, tmp_path: Path
) -> None:
    done = run(tmp_path, "--levels", "regular", "--steps", "1", "--seeds", "2", "--limit", "1")
    assert [level["acceleration"] for level in done.result["levels"]] == ["none", "regular"]
    assert (done.result["prompts"], done.result["prompts_asked"]) == (1, 1)
    regular = done.level("regular")
    assert regular["left_out"] == ["eight_bit_linears"]
    assert "no 8-bit products" in regular["notices"][0]
    psnr = regular["metrics"]["psnr"]  # infinite, which JSON cannot say
    assert (psnr["mean"], psnr["median"], psnr["worst"], psnr["worst_prompt"]) == (None,) * 4
    assert psnr["note"] == "2 of 2 pictures are equal to those of none, PSNR infinite"
    assert regular["metrics"]["ssim"]["mean"] == 1
    assert psnr["note"] in done.table
    assert "notice          acceleration='regular': runs in float32" in done.table


def test_an_interrupt_reports_the_prompts_that_are_finished(
    loaded: Krea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two to warm up, two of the first prompt, and one of the second.
    monkeypatch.setattr(Krea, "txt2img", fails_after(5, KeyboardInterrupt()))
    sheet = tmp_path / "sheet.png"
    done = run(tmp_path, "--levels", "high", "--steps", "1", "--sheet", str(sheet))
    assert done.code == 130
    assert (done.result["prompts"], done.result["prompts_asked"]) == (1, 2)
    assert done.result["stopped"] == "interrupted"
    assert "1 prompts x 1 seeds (of 2 prompts: interrupted)" in done.table
    with Image.open(sheet) as image:
        row = sheets.CAPTION + 256 + sheets.FIGURES + sheets.BETWEEN
        assert image.height == sheets.HEAD + row


def test_an_error_reports_the_prompts_that_are_finished(
    loaded: Krea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Krea, "txt2img", fails_after(5, KreaError("the GPU is full")))
    done = run(tmp_path, "--levels", "high", "--steps", "1")
    assert done.code == 1
    assert done.result["stopped"] == "the GPU is full"
    assert done.result["prompts"] == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (KreaError("the GPU is full"), 1, "is full")],
)
def test_with_no_prompt_finished_there_is_no_report(
    loaded: Krea,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(Krea, "txt2img", fails_after(3, error))
    with pytest.raises(SystemExit) as left:
        run(tmp_path, "--levels", "high", "--steps", "1", "--output", str(tmp_path / "out.jsonl"))
    assert left.value.code == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def fails_after(calls: int, error: BaseException) -> Any:
    """`Krea.txt2img`, which raises once it was called so often."""
    draw, left = Krea.txt2img, iter(range(calls))

    def txt2img(self: Krea, *arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise error
        return draw(self, *arguments, **named)

    return txt2img


def test_levels_take_turns_in_going_first_and_have_the_same_seeds(
    loaded: Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(
        krea: Krea, prompt: str, seed: int, level: str, plan: Plan
    ) -> tuple[Image.Image, Shot]:
        drawn.append((level, seed))
        shot = Shot(prompt, seed, level, 1.0, None, (64, 64), (), {})
        return Image.new("RGB", (64, 64)), shot

    monkeypatch.setattr(fidelity, "draw", draw)
    plan = Plan(("none", "regular", "high"), 4, 64, 64, 1, ())
    row = fidelity.judge(loaded, "a fox", plan, first=2, keep=False)
    assert [level for level, _ in drawn[::3]] == ["high", "none", "regular", "high"]
    assert [seed for _, seed in drawn] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [shot.level for shot in row.shots] == ["none", "regular", "high"] * 4
    assert row.thumbnails == ()


def test_the_pipelines_step_cache_is_put_back() -> None:
    from krea_local import engine

    with fidelity.recorded_caches() as caches:
        cache = engine.StepCache(Skipping(), torch.linspace(1, 0, 5))
    assert caches == [cache]
    assert engine.StepCache is StepCache


def test_a_prompts_file_has_one_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# ours\n\n  a fox \r\n\t# not this\na #hashtag on a wall\n", "utf-8")
    assert fidelity.read_prompts(file) == ["a fox", "a #hashtag on a wall"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no prompts"), (b"\n # only this\n", "no prompts"), (b"caf\xe9", "is not UTF-8")],
)
def test_a_prompts_file_without_prompts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        fidelity.main(["tiny", "--prompts", str(file)])
    assert left.value.code == 1
    assert f"--prompts {file}: " in (said_all := capsys.readouterr().err)
    assert said in said_all


def test_the_built_in_prompts_are_as_many_as_the_goals_want() -> None:
    assert len(set(fidelity.PROMPTS)) == len(fidelity.PROMPTS) >= fidelity.GOAL_PROMPTS
    assert all(prompt == prompt.strip() and "\n" not in prompt for prompt in fidelity.PROMPTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sheet", "sheet.jpeg"], "should end in .png"),
        (["--sheet", "."], "should end in .png"),
        (["--output", "."], "--output .: should be a file"),
        (["--prompts", "nowhere.txt"], "No such file"),
        (["--image-size", "big"], "should be WIDTHxHEIGHT or a preset"),
        (["--clip", "nowhere"], "no tokenizer.json or vocab.json"),
        (["--image-reward", "nowhere"], "no tokenizer.json or vocab.txt"),
        (["--emulate", "int8", "--device", "cuda"], "needs --device cpu"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fidelity, "choose_device", torch.device)
    monkeypatch.setattr(fidelity, "krea_of", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as left:
        fidelity.main(["tiny", *options])
    assert left.value.code == 1
    assert said in capsys.readouterr().err


# --- Figures of a picture ---


def picture(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * 4) % 256, (y * 5 + x) % 256, (x * y) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    assert figures.psnr(grey, grey) == math.inf
    assert figures.psnr(grey, grey.point(lambda value: value + 1)) == pytest.approx(48.1308036)
    one_channel = Image.new("RGB", (16, 16), (103, 100, 100))
    assert figures.psnr(one_channel, grey) == pytest.approx(10 * math.log10(255**2 / 3))


# scikit-image 0.26: structural_similarity(..., channel_axis=2, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=255)
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda pixels: 255 - pixels, -0.4118047012539958),
        (lambda pixels: np.roll(pixels, 3, axis=1), 0.6212398228002446),
        (lambda pixels: pixels // 2, 0.6924175824880963),
    ],
)
def test_ssim_is_scikit_images(change: Any, wanted: float) -> None:
    other = Image.fromarray(change(np.asarray(picture())))
    assert figures.ssim(picture(), other) == pytest.approx(wanted, abs=1e-9)


def test_ssim_is_what_its_definition_says_window_by_window() -> None:
    one = np.asarray(picture(16, 13), np.float64)
    other = np.asarray(noisy(picture(16, 13), 20), np.float64)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(3):
        for top in range(13 - 10):
            for left in range(16 - 10):
                x, y = (p[top : top + 11, left : left + 11, channel] for p in (one, other))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                covariance = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 2.55**2, 7.65**2
                similar = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
                found.append(similar * (2 * covariance + c2) / (vx + vy + c2))
    images = (Image.fromarray(each.astype(np.uint8)) for each in (one, other))
    assert figures.ssim(*images) == pytest.approx(np.mean(found), abs=1e-12)


def test_ssim_is_one_for_equal_pictures_symmetric_and_falls_with_noise() -> None:
    clean = picture()
    assert figures.ssim(clean, clean) == 1
    falling = [figures.ssim(clean, noisy(clean, sigma)) for sigma in (2, 8, 32, 128)]
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] < falling[0] < 1
    assert figures.ssim(noisy(clean, 8), clean) == pytest.approx(falling[1], abs=1e-12)


def test_lpips_says_why_it_is_left_out_and_fetches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert figures.why_no_lpips() == "the package lpips is not installed"
    monkeypatch.setattr(figures, "find_spec", lambda name: name)
    assert "lpips cannot be imported: " in str(figures.why_no_lpips())
    monkeypatch.setitem(sys.modules, "lpips", stand_in_for_lpips())
    assert "AlexNet's weights are not fetched unasked" in str(figures.why_no_lpips())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / figures.ALEXNET).touch()
    assert figures.why_no_lpips() is None
    lpips = figures.lpips_of(CPU)
    grey, white = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 255))
    assert lpips(grey, white) == pytest.approx(2)  # given as -1 … 1
    assert lpips(grey, grey) == 0


def stand_in_for_lpips() -> types.ModuleType:
    """The package's interface; the distance is the mean absolute difference."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            assert (net, verbose) == ("alex", False)
            super().__init__()

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return (one - other).abs().mean().reshape(1, 1, 1, 1)

    module = types.ModuleType("lpips")
    module.__spec__ = importlib.machinery.ModuleSpec("lpips", None)
    module.LPIPS = LPIPS
    return module


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A CLIP model with random weights and the tiny checkpoint's tokenizer."""
    import shutil

    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = Path(
        shutil.copytree(tiny_folder / "tokenizer", tmp_path_factory.mktemp("clip") / "clip")
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, "vocab_size": 1000, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_models_own_logit_without_its_scale(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    clip = figures.clip_of(clip_folder, CPU)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    text = CLIPTokenizer.from_pretrained(clip_folder)("a red fox", return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(picture(), return_tensors="pt")
    with torch.inference_mode():
        logits = model(**text, **pixels).logits_per_image
    wanted = 100 * float(logits) / float(model.logit_scale.detach().exp())
    assert clip("a red fox", picture()) == pytest.approx(wanted, abs=1e-4)
    assert clip("a red fox", noisy(picture(), 60)) != pytest.approx(wanted, abs=1e-3)
    assert abs(clip("word " * 500, picture())) < 100  # cut, and no error


def test_a_damaged_clip_folder_is_an_error(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(WeightsInvalid, match="is truncated"):
        figures.clip_of(folder, CPU)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(WeightsNotFound, match="no preprocessor_config"):
        figures.clip_of(folder, CPU)


def image_reward_state() -> dict[str, torch.Tensor]:
    """ImageReward's tensors at small sizes: 32 pixels, 2 layers each, always the same."""
    width, words = 64, 128
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    eyes, text = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{eyes}.cls_token"] = (1, 1, width)
    shapes[f"{eyes}.pos_embed"] = (1, 17, width)
    shapes |= {f"{eyes}.patch_embed.proj.weight": (width, 3, 8, 8)}
    shapes |= {f"{eyes}.patch_embed.proj.bias": (width,)}
    norm(f"{eyes}.norm", width)
    for block in (f"{eyes}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
    for name, rows in (("word", 40), ("position", 48)):
        shapes[f"{text}.embeddings.{name}_embeddings.weight"] = (rows, words)
    norm(f"{text}.embeddings.LayerNorm", words)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for attention, source in (("attention", words), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", words, words)
            linear(f"{layer}.{attention}.self.key", source, words)
            linear(f"{layer}.{attention}.self.value", source, words)
            linear(f"{layer}.{attention}.output.dense", words, words)
            norm(f"{layer}.{attention}.output.LayerNorm", words)
        linear(f"{layer}.intermediate.dense", words, 256)
        linear(f"{layer}.output.dense", 256, words)
        norm(f"{layer}.output.LayerNorm", words)
    for number, inputs, outputs in ((0, words, 32), (2, 32, 16), (7, 16, 1)):
        linear(f"mlp.layers.{number}", inputs, outputs)
    linear("blip.vision_proj", width, 8)  # not used
    random = np.random.default_rng(0)
    state = {}
    for name, shape in shapes.items():
        is_gain = name.endswith("weight") and len(shape) == 1
        values = random.normal(float(is_gain), 0.15, shape)
        state[name] = torch.from_numpy(values.astype(np.float32))
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    return state


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *"abcdefghijk", "fox", "##es", "red"]))
    save_file(image_reward_state(), folder / "ImageReward.safetensors")
    return folder


# ImageReward.score of image-reward 1.5, with transformers 4.40, on these very weights.
@pytest.mark.parametrize(
    ("size", "prompt", "wanted"),
    [
        ((64, 48), "a red fox", -0.5890737175941467),
        ((64, 48), "foxes a b c " * 20, -0.44194668531417847),  # cut at 35 tokens
        ((48, 80), "a red fox", -0.4864967465400696),
        ((32, 32), "foxes a b c " * 20, -0.7403693199157715),
    ],
)
def test_image_reward_is_that_of_its_own_package(
    image_reward_folder: Path, size: tuple[int, int], prompt: str, wanted: float
) -> None:
    reward = figures.image_reward_of(image_reward_folder / "ImageReward.safetensors", CPU)
    assert reward(prompt, picture(*size)) == pytest.approx(wanted, abs=1e-5)


def test_damaged_weights_of_image_reward_are_an_error(
    image_reward_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "vocab.txt").write_bytes((image_reward_folder / "vocab.txt").read_bytes())
    with pytest.raises(WeightsNotFound, match=r"no file .*ImageReward\.safetensors"):
        figures.image_reward_of(tmp_path, CPU)
    file = tmp_path / "ImageReward.safetensors"
    state = image_reward_state()
    for damage in ("blip.text_encoder.embeddings.LayerNorm.bias", "mlp.layers.7.weight"):
        save_file({name: state[name] for name in state if name != damage}, file)
        with pytest.raises(WeightsInvalid, match="cannot be read"):
            figures.image_reward_of(tmp_path, CPU)
    for content in (b"", b"short", (image_reward_folder / file.name).read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(WeightsInvalid, match="is truncated"):
            figures.image_reward_of(file, CPU)


def test_all_metrics_that_are_given_are_found(
    clip_folder: Path, image_reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "why_no_lpips", lambda: None)
    monkeypatch.setitem(sys.modules, "lpips", stand_in_for_lpips())
    given = ["--clip", str(clip_folder), "--image-reward", str(image_reward_folder)]
    metrics, unmeasured = figures.find_metrics(fidelity._parser().parse_args(["tiny", *given]))
    assert [metric.name for metric in metrics] == list(figures.TITLES)
    assert unmeasured == {}
    for metric in metrics:
        assert math.isfinite(metric.measure("a fox", picture(), noisy(picture(), 9)))


# --- The report ---

LPIPS = Metric("lpips", lambda *_: 0.0, compares=True, more_is_better=False)
REWARD = Metric("image_reward", lambda *_: 0.0, compares=False, more_is_better=True)


def shots(metric: Metric, level: str, figures: list[float]) -> list[Shot]:
    return [
        Shot(f"prompt {i}", i, level, 1.0, None, (64, 64), (), {metric.name: figure})
        for i, figure in enumerate(figures)
    ]


def report(
    metric: Metric, none: list[float], own: list[float], level: str = "regular", *lossy: str
) -> dict[str, Any]:
    """The figures of `metric` at `level`."""
    both = shots(metric, "none", none) + shots(metric, level, own)
    plan = Plan(("none", level), 1, 64, 64, 28, (metric,))
    steps = list(lossy or ("eight_bit_linears", "skip_steps"))
    found = fidelity.level_report(level, both, plan, steps)
    figures: dict[str, Any] = found["metrics"][metric.name]
    return figures


def test_lpips_has_a_goal_for_the_mean_and_its_worst_is_the_highest() -> None:
    found = report(LPIPS, [0, 0, 0], [0.05, 0.20, 0.08])
    assert found["mean"] == pytest.approx(0.11)
    assert (found["median"], found["worst"], found["worst_prompt"]) == (0.08, 0.20, "prompt 1")
    assert found["goal"] == {"of": "mean", "below": 0.13, "met": True, "not_judged": None}
    assert report(LPIPS, [0], [0.13])["goal"]["met"] is False


@pytest.mark.parametrize(
    ("level", "own", "met"),
    [
        ("regular", [1.095, 0.890], True),
        ("regular", [1.080, 0.900], False),
        ("high", [1.080, 0.900], True),
        ("high", [1.000, 0.940], False),
        ("high", [1.200, 1.000], True),  # better than none
    ],
)
def test_image_reward_has_a_goal_for_the_share_that_is_lost(
    level: str, own: list[float], met: bool
) -> None:
    found = report(REWARD, [1.1, 0.9], own, level)
    assert found["lost_percent"] == pytest.approx(100 - 50 * sum(own))
    assert found["goal"]["met"] is met


def test_the_worst_of_a_score_is_the_largest_loss() -> None:
    found = report(REWARD, [0.5, 1.0, 1.5], [0.4, 0.7, 1.6])
    assert found["worst"] == pytest.approx(-0.3)
    assert (found["worst_prompt"], found["worst_seed"]) == ("prompt 1", 1)
    none = fidelity.summary(REWARD, *[shots(REWARD, "none", [0.5, 1.0, 1.5])] * 2)
    assert none == {"mean": 1.0, "median": 1.0}


def test_a_goal_is_not_judged_where_it_means_nothing() -> None:
    found = report(LPIPS, [0], [0.01], "high", "skip_steps")
    assert found["goal"]["met"] is None
    assert found["goal"]["not_judged"] == "eight_bit_linears did not run"
    found = report(REWARD, [-0.2], [-0.1])
    assert found["goal"]["not_judged"] == "the mean of none is not above 0"
    found = report(LPIPS, [0], [math.nan])
    assert found["goal"]["not_judged"] == "nothing to judge"
    assert found["note"] == "1 of 1 pictures are not finite"


def test_equal_pictures_are_counted_and_the_others_averaged() -> None:
    psnr = Metric("psnr", lambda *_: 0.0, compares=True, more_is_better=True)
    found = report(psnr, [0, 0, 0], [math.inf, 30.0, 40.0])
    assert (found["mean"], found["worst"], found["worst_prompt"]) == (35.0, 30.0, "prompt 1")
    assert found["note"] == "1 of 3 pictures are equal to those of none, PSNR infinite"


def test_the_table_shows_whether_goals_are_met_beside_the_figures(whole: Run) -> None:
    def shown(metric: Metric, none: list[float], own: list[float]) -> str:
        figures = report(metric, none, own)
        levels = [
            whole.level("none") | {"metrics": {}},
            whole.level("regular") | {"metrics": {metric.name: figures}},
        ]
        return fidelity.table(whole.result | {"levels": levels})

    text = shown(LPIPS, [0], [0.1])
    assert "LPIPS           regular      0.1000" in text
    assert "goal below 0.13: met (on 2 prompts; it wants 50)" in text
    assert "goal below 0.13: not met" in shown(LPIPS, [0], [0.2])
    text = shown(REWARD, [1.0], [0.98])
    assert "2.00 % of the mean of none is lost" in text
    assert "goal below 1 %: not met" in text
    assert "3.00 % of the mean of none is won" in shown(REWARD, [1.0], [1.03])
    assert "goal below 1 %: not judged: the mean of none" in shown(REWARD, [-1.0], [0.5])
