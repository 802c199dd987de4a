"""Ours against everybody else's, in one run on one GPU: `python -m benchmarks.compare`.

Random weights at FLUX.1's true shapes, the same for every engine, from prompt to picture, without a
safety checker. Measures, in this order: each of our levels, from the process's first picture on, at
every size and batch; how exact they are; what the GPU can do at these shapes; what each step of the
levels brings; the peers of `benchmarks.peers`. Every figure is written at once, one JSON object a
line, so that a run that is cut short loses nothing. Steps are skipped by a fixed pattern, half of
them: with random weights the changes that a threshold looks at mean nothing.

`python -m benchmarks.plot FILE` draws the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import ceilings
from benchmarks.fidelity import EMULATED, emulated
from benchmarks.latency import device_name, parse_size, positive
from benchmarks.peers import PEERS
from benchmarks.random_model import as_diffusers, krea_of
from benchmarks.timing import (
    HALF,
    Calls,
    Timed,
    described,
    krea_draw,
    measure,
    peer_draw,
    prepare,
    reason_of,
    timed,
)
from krea_local import vae
from krea_local.engine import Engine
from krea_local.errors import InvalidRequest, KreaError
from krea_local.info import versions
from krea_local.sampling import latent_ids
from krea_local.schema import Acceleration
from krea_local.speed import LEVELS, Place, Settings, settings_of
from krea_local.transformer import Config, FluxTransformer

SIZES = ("512x512", "1024x768", "1024x1024", "1280x1280", "2048x2048")
UNSEEN = ("512x512", "768x1344", "1280x1280")  # right after the first pictures of the main size
TEXT_TOKENS = 512


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="random-12b", help="random-12b, tiny, or a folder")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--main-size", default="1024x1024", help="of peers and of the waterfall")
    parser.add_argument("--batches", nargs="+", type=positive, default=(1, 4))
    parser.add_argument("--steps", type=positive, default=28)
    parser.add_argument("--runs", type=positive, default=3, help="measured calls of each engine")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure, to split a run (default: all)",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="NAME",
        help="only these, such as krea_local:none diffusers:eager (default: all)",
    )
    parser.add_argument(
        "--eight-bit", choices=list(EMULATED), help="for regular and high, whatever the GPU is"
    )
    parser.add_argument("--ceiling-seconds", type=float, default=5.0, help="each, sustained")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="file of JSON lines, which must not exist")
    options = parser.parse_args(arguments)
    known = {*(f"krea_local:{level}" for level in LEVELS), *(peer.engine for peer in PEERS)}
    for engine in options.engines or ():
        if engine not in known:
            parser.error(f"--engines {engine}: should be one of {', '.join(sorted(known))}")
    lines: list[dict[str, Any]] = []
    try:
        for size in (*options.sizes, options.main_size):
            if any(side % 16 for side in parse_size(size)):
                raise InvalidRequest(f"size {size}: should be multiples of 16")
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("x").close()
        with emulated(options.eight_bit) if options.eight_bit else nullcontext():
            run = Run(options, lines)
            for part in PARTS:
                if part in options.parts:
                    try:
                        PARTS[part](run)
                    except Exception as error:  # the others are still measured
                        run.write("part", engine=part, failed=reason_of(error))
                    run.engine.forget()  # so that the next part's peak memory is its own
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        if lines:
            print(table(lines))
    return int(any(line["kind"] == "part" for line in lines))


class Run:
    """The models, built once, and where figures go."""

    def __init__(self, options: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
        self.options = options
        self.lines = lines
        start = time.perf_counter()
        batch = min(4, max(options.batches))
        self.krea = krea_of(options.model, options.device, options.dtype, "none", batch)
        load_seconds = time.perf_counter() - start
        self.device = self.krea.device
        transformer = self.krea.models.transformer
        assert isinstance(transformer, FluxTransformer)
        self.transformer = transformer
        assert isinstance(self.krea.engine, Engine)
        self.engine = self.krea.engine
        self.main_size = parse_size(options.main_size)
        self.common = {
            "model": self.krea.label,
            "device": device_name(self.device),
            "dtype": str(self.krea.dtype).removeprefix("torch."),
            "offload": "none",
            "steps": options.steps,
            "load_seconds": load_seconds,
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
        }
        self.calls = Calls(self.device, options.steps, options.runs)

    def wanted(self, engine: str) -> bool:
        """Whether `engine` is to be measured."""
        return not self.options.engines or engine in self.options.engines

    def write(self, kind: str, **figures: Any) -> None:
        """Keep one line, and store it at once."""
        line = {"kind": kind, **self.common, **figures}
        self.lines.append(line)
        print(json.dumps({key: line[key] for key in line if key != "versions"}), flush=True)
        if self.options.output:
            with self.options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def diffusers(self) -> Iterator[Any]:
        """The models with diffusers' transformer, mostly in the same memory."""
        models = dataclasses.replace(self.krea.models, transformer=as_diffusers(self.transformer))
        models.vae.to(memory_format=torch.contiguous_format)  # as it comes from a file
        try:
            yield models
        finally:
            vae.prepare(models.vae, self.device)
            gc.collect()


def exactness(run: Run) -> None:
    """Relative L2 error of one forward pass against float32, with the same rounded inputs."""
    width, height = run.main_size
    model, device, dtype = run.transformer, run.device, run.krea.dtype
    rows, columns = (side // run.krea.size_multiple for side in (height, width))
    random = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    config = model.config
    latents = draw(1, rows * columns, config.in_channels)
    prompt_embeds = draw(1, TEXT_TOKENS, config.joint_attention_dim)
    pooled = draw(1, config.pooled_projection_dim)
    # Their thousandfold is exact in bfloat16, so that rounding the inputs is not what is compared.
    timestep, guidance = 0.5, 4.0
    txt_ids = torch.zeros(TEXT_TOKENS, 3, device=device)
    img_ids = latent_ids(rows=rows, columns=columns).to(device)

    def theirs(model: Any, number: torch.dtype) -> Tensor:
        result: Tensor = model(
            hidden_states=latents.to(number),
            encoder_hidden_states=prompt_embeds.to(number),
            pooled_projections=pooled.to(number),
            timestep=torch.tensor([timestep], device=device),
            guidance=torch.tensor([guidance], device=device),
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return result.float()

    def ours(settings: Settings) -> Tensor:
        variant = run.engine.variant(settings)
        conditioning = variant.condition(
            prompt_embeds,
            pooled,
            timesteps=torch.tensor([timestep], device=device, dtype=dtype),
            guidance=torch.tensor([guidance], device=device),
            txt_ids=txt_ids,
            img_ids=img_ids,
        )
        result: Tensor = variant(latents, conditioning, 0, settings.execution)
        return result.float()

    with torch.inference_mode():
        with run.diffusers() as models:
            found = {"diffusers:eager": theirs(models.transformer, dtype)}
            exact_model = as_diffusers(run.transformer, torch.float32)
            reference = theirs(exact_model, torch.float32)
            del exact_model
        gc.collect()
        found["krea_local:plain-torch"] = ours(Settings())
        for level in ("none", "regular"):
            settings = run.krea.prepare(level)
            if level == "none" or settings.eight_bit is not None:
                found[f"krea_local:{level}"] = ours(settings)
    size = reference.norm()
    for engine, velocity in found.items():
        run.write(
            "exactness",
            engine=engine,
            width=width,
            height=height,
            relative_error=float((velocity - reference).norm() / size),
        )


def limits(run: Run) -> None:
    """What the device can do at the model's shapes."""
    scale = 1 if run.device.type == "cuda" else 32
    seconds = run.options.ceiling_seconds
    found: dict[str, Any] = {
        "gemm_tflops": ceilings.gemm_rates(run.device, seconds, scale=scale),
        "attention_tflops": ceilings.attention_rates(run.device, min(seconds, 1.0), scale=scale),
        "copy_gb_per_second": ceilings.copy_rates(run.device, scale=scale),
    }
    run.write("ceilings", **found)
    for line in list(run.lines):
        if line["kind"] == "latency" and "tflops" in line:
            share = roofline_share(run.transformer.config, line, found)
            if share is not None:
                keys = ("engine", "width", "height", "batch")
                run.write("roofline", share=share, **{key: line[key] for key in keys})


def ours(run: Run) -> None:
    """Every level at every size and batch; after the first, sizes in a row that it has not seen."""
    for level in get_args(Acceleration):
        engine = f"krea_local:{level}"
        if not run.wanted(engine):
            continue
        start = time.perf_counter()
        prepare(run.krea, level)
        prepare_seconds = time.perf_counter() - start
        draw = krea_draw(run.krea, level)
        # The main size first: its first image is the one that a newcomer waits for.
        sizes = sorted(map(parse_size, run.options.sizes), key=lambda size: size != run.main_size)
        for batch, size in itertools.product(run.options.batches, sizes):
            figures = measure(draw, run.calls, size, batch)
            run.write(
                "latency",
                engine=engine,
                prepare_seconds=prepare_seconds,
                notices=list(run.engine.notices.get(level, ())),
                settings=described(run.engine.settings[level]),
                **figures,
                **achieved(run, figures, level),
            )
            if (batch, size) == (run.options.batches[0], sizes[0]):
                new_sizes(run, draw, engine)


def new_sizes(run: Run, draw: Timed, engine: str) -> None:
    """Sizes in a row that the engine has not seen: their first picture against their second."""
    for size in map(parse_size, UNSEEN if run.krea.label == "random-12b" else ["96x64"]):
        first, second = (timed(draw, run.calls, size, 1, seed)[0] for seed in range(2))
        run.write(
            "new_size",
            engine=engine,
            width=size[0],
            height=size[1],
            first_seconds=first,
            second_seconds=second,
        )


def waterfall(run: Run) -> None:
    """The steps of the last level, one added at a time, at the main size."""
    krea = run.krea
    steps = LEVELS["high"]
    kept = krea.engine.settings.get("none")
    try:
        for count in range(len(steps) + 1):
            settings, notices = settings_of(steps[:count], Place(run.device, run.transformer))
            if settings.skipping is not None:
                settings = dataclasses.replace(settings, skipping=HALF)
            krea.engine.settings["none"] = settings
            figures = measure(krea_draw(krea, "none"), run.calls, run.main_size, 1)
            run.write(
                "waterfall",
                engine="krea_local",
                added=steps[count - 1].name if count else "fused projections, tables by step",
                lossless=all(step.lossless for step in steps[:count]),
                settings=described(krea.engine.settings["none"]),  # in force, after all
                notices=[*notices, *krea.engine.notices.get("none", ())],
                **figures,
            )
    finally:
        krea.engine.settings.pop("none", None)
        if kept is not None:
            krea.engine.settings["none"] = kept


def peers(run: Run) -> None:
    """The others, at the main size and every batch."""
    with run.diffusers() as models:
        for peer in PEERS:
            if not run.wanted(peer.engine):
                continue
            figures: dict[str, Any] = {"width": run.main_size[0], "height": run.main_size[1]}
            reason = peer.needs(run.device)
            if reason is None:
                try:
                    with peer.build(models) as draw:
                        # Compiling for a batch of 4 as well would double the minutes.
                        compiles = "compile" in peer.engine or "flux-fast" in peer.engine
                        batches = (1,) if compiles else run.options.batches
                        for batch in batches:
                            figures = measure(peer_draw(draw), run.calls, run.main_size, batch)
                            run.write(
                                "latency", engine=peer.engine, lossless=peer.lossless, **figures
                            )
                    continue
                except Exception as error:  # one peer that fails is a finding, not the end
                    reason = reason_of(error)
                    figures = {"width": run.main_size[0], "height": run.main_size[1]}
            run.write("latency", engine=peer.engine, failed=reason, **figures)


PARTS: dict[str, Callable[[Run], None]] = {
    "ours": ours,
    "exactness": exactness,
    "ceilings": limits,
    "waterfall": waterfall,
    "peers": peers,
}


def forward_tflop(config: Config, image_tokens: int) -> tuple[float, float]:
    """One step of one image: (linears, attention), in 10^12 operations."""
    width, tokens = config.hidden_size, image_tokens + TEXT_TOKENS
    blocks = config.num_layers + config.num_single_layers
    linears = (
        2 * 12 * width**2 * tokens * blocks + 2 * 2 * config.in_channels * width * image_tokens
    )
    return linears / 1e12, 4 * tokens**2 * width * blocks / 1e12


def achieved(run: Run, figures: dict[str, Any], level: Acceleration) -> dict[str, float]:
    """Work of the denoising loop, in 10^12 operations, and how much of it is done a second."""
    tokens = figures["width"] * figures["height"] // run.krea.size_multiple**2
    settings = run.engine.settings[level]
    computed = run.options.steps
    if settings.skipping is not None:
        computed -= sum(HALF.pattern(run.options.steps))
    linears, attended = (
        work * computed * figures["batch"] for work in forward_tflop(run.transformer.config, tokens)
    )
    seconds = figures["stages"]["denoise"]
    return {
        "linears_tflop": linears,
        "attention_tflop": attended,
        "tflops": (linears + attended) / seconds,
    }


def roofline_share(config: Config, line: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """The time that the ceilings allow for the loop's work, over the time it took."""
    kind = {"float8_e4m3fn": "fp8_rowwise", "int8": "int8"}.get(
        line["settings"]["eight_bit"], "bf16"
    )
    # Each shape counts by its share of the work: (N, K) and how often a pair of blocks has it.
    work = {(9216, 3072): 19, (3072, 3072): 19, (12288, 3072): 19, (3072, 12288): 19}
    work |= {(21504, 3072): 38, (3072, 15360): 38}
    seconds_a_tflop, total = 0.0, 0
    for name, rate in ceilings["gemm_tflops"][kind].items():
        _, n, k = map(int, name.split("x"))
        if not isinstance(rate, float) or (n, k) not in work:
            return None
        share = n * k * work[n, k]
        seconds_a_tflop += share / rate
        total += share
    tokens = line["width"] * line["height"] // 256 + TEXT_TOKENS
    rates = [
        found.get(str(tokens))
        for name, found in ceilings["attention_tflops"].items()
        if name not in ("default_is", "fa3_fp8")
    ]
    best = max((rate for rate in rates if isinstance(rate, float)), default=None)
    if best is None or config.hidden_size != 3072:
        return None
    floor = line["linears_tflop"] * seconds_a_tflop / total + line["attention_tflop"] / best
    return float(floor / line["stages"]["denoise"])


def table(lines: list[dict[str, Any]]) -> str:
    """The figures for people: seconds, and ratios to diffusers eager of the same run."""
    rows = [
        f"{'engine':44} {'size':>9} {'batch':>5} {'s':>8} {'first':>8} {'GiB':>6} {'x eager':>8}"
    ]
    eager = {
        (line["width"], line["height"], line["batch"]): line["seconds"]
        for line in lines
        if line["kind"] == "latency" and line["engine"] == "diffusers:eager" and "seconds" in line
    }
    for line in lines:
        size = f"{line['width']}x{line['height']}" if "width" in line else ""
        if line["kind"] in ("latency", "waterfall") and "seconds" in line:
            name = line["engine"] + (f" + {line['added']}" if "added" in line else "")
            base = eager.get((line["width"], line["height"], line["batch"]))
            ratio = f"{base / line['seconds']:8.2f}" if base else f"{'':>8}"
            rows.append(
                f"{name[:44]:44} {size:>9} {line['batch']:5} {line['seconds']:8.3f} "
                f"{line['first_image_seconds']:8.2f} {line['peak_gib']:6.1f} {ratio}"
            )
        elif "failed" in line:
            rows.append(f"{line['engine'][:44]:44} {size:>9} not measured: {line['failed']}")
        elif line["kind"] == "exactness":
            error = f"relative error {line['relative_error']:.2e}"
            rows.append(f"{line['engine'][:44]:44} {size:>9} {error}")
        elif line["kind"] == "new_size":
            rows.append(
                f"{line['engine'] + ', a new size':44} {size:>9} {'':5} "
                f"{line['second_seconds']:8.3f} {line['first_seconds']:8.2f}"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
