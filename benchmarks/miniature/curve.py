"""How training went: figures by step, kept as JSON lines beside the weights."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path


class Curve:
    """Appends to `path` and says on standard error how things stand."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, stage: str, step: int, seconds: float, **figures: float) -> None:
        row = {"stage": stage, "step": step, "seconds": round(seconds, 2)}
        row |= {name: round(value, 5) for name, value in figures.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            " ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True
        )


def plot(path: Path, picture: Path) -> None:
    """Draw the curves that `path` holds to the PNG file `picture`."""
    from matplotlib.figure import Figure

    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line, of a run that was killed
            rows.append(json.loads(line))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(4 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        points = {row["step"]: row for row in rows if row["stage"] == stage}
        name = "loss" if "loss" in next(iter(points.values())) else "psnr"
        values = [row[name] for row in points.values()]
        axes.plot(list(points), values, linewidth=0.8)
        axes.set(title=stage, xlabel="step", ylabel="PSNR, dB" if name == "psnr" else name)
        if name == "loss" and min(values) > 0:
            axes.set_yscale("log")
    figure.savefig(picture, dpi=110)
