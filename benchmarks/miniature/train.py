"""`python -m benchmarks.miniature.train FOLDER`: make the miniature, from nothing to a checkpoint.

Goes on where an earlier run with the same folder stopped. Everything is drawn from fixed seeds, so
two runs on one kind of machine see the same pictures; sums of floats may still differ.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from benchmarks.miniature import autoencoder, flow, latents, models, reading, state
from benchmarks.miniature.curve import Curve, plot
from krea_local import tiny


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.train", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="where the stages and the checkpoint go")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    curve = Curve(folder / "curve.jsonl")
    vae = autoencoder.train(folder, curve)
    pictures = latents.make(folder, vae)
    decoder = autoencoder.polish(folder, latents.even(folder), curve)
    weights = flow.train(folder, reading.train(folder, curve), pictures, curve)
    weights = flow.train_more(folder, weights, pictures, curve)
    distilled = flow.distill(folder, weights, pictures, curve)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    tiny.write_checkpoint(checkpoint, lambda partial: export(partial, decoder, distilled))
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    plot(folder / "curve.jsonl", folder / "curve.png")
    print(f"{checkpoint}: {sum(file.stat().st_size for file in files):,} bytes")


def export(folder: Path, vae_weights: Path, flow_weights: Path) -> None:
    """Write the checkpoint to the empty `folder`, in the format of the 12 B one."""
    model = flow.Model(folder)  # writes the tokenizers
    model.load_state_dict(state.read(flow_weights)[0])
    model.encoders.spread_cases()
    vae = models.autoencoder()
    vae.load_state_dict(state.read(vae_weights)[0])
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    for name, module in (
        ("transformer", model.transformer),
        ("vae", vae),
        ("text_encoder", model.encoders.clip),
        ("text_encoder_2", model.encoders.t5),
    ):
        tiny.save_model(module, folder / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.write_safety_checker(folder / "safety_checker", width=8, side=16)
    tiny.write_settings(folder)


if __name__ == "__main__":
    main()
