"""Draw a run of `benchmarks.compare`: `python -m benchmarks.plot FILE.jsonl [PICTURE.png]`.

Left, seconds a picture of every engine; right, what each step of our levels brings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OURS, LOSSLESS, LOSSY = "#c2410c", "#475569", "#94a3b8"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("lines", type=Path, help="JSON lines of benchmarks.compare")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG (default: beside the lines)")
    options = parser.parse_args(arguments)
    try:
        lines = [json.loads(line) for line in options.lines.read_text().splitlines()]
        picture = options.picture or options.lines.with_suffix(".png")
        draw(lines, picture)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(picture)
    return 0


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Write the picture.

    Raises:
        ValueError: no figures to draw.
    """
    bars, size = engines(lines)
    added = [line for line in lines if line["kind"] == "waterfall"]
    columns = 1 + bool(added)
    height = 1.6 + 0.36 * max(len(bars), len(added))
    figure, axes = pyplot.subplots(1, columns, figsize=(7 * columns, height), squeeze=False)
    left = axes[0, 0]
    left.barh(
        [line["engine"] for line in bars],
        [line["seconds"] for line in bars],
        color=[
            OURS
            if line["engine"].startswith("krea_local")
            else (LOSSLESS if line.get("lossless", True) else LOSSY)
            for line in bars
        ],
    )
    for place, line in enumerate(bars):
        left.text(line["seconds"], place, f" {line['seconds']:.2f}", va="center", fontsize=9)
    first = bars[0]
    left.set_title(f"{first['device']}, {size[0]}x{size[1]}, {first['steps']} steps", loc="left")
    left.set_xlabel("seconds from prompt to picture, median, hot (light: lossy)")
    if added:
        right = axes[0, 1]
        right.barh(
            [line["added"] for line in added], [line["seconds"] for line in added], color=OURS
        )
        for place, line in enumerate(added):
            right.text(line["seconds"], place, f" {line['seconds']:.2f}", va="center", fontsize=9)
        right.set_title("krea_local, one step after another", loc="left")
        right.set_xlabel("seconds")
    for one in axes.flat:
        one.invert_yaxis()
        one.spines[["top", "right"]].set_visible(False)
        one.margins(x=0.12)
    figure.tight_layout()
    partial = picture.with_name(picture.name + ".part")
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    partial.replace(picture)


def engines(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """The engines' single pictures at the size that most of them have, slowest first."""
    single = [
        line
        for line in lines
        if line["kind"] == "latency" and line.get("batch") == 1 and "seconds" in line
    ]
    if not single:
        raise ValueError("no line has seconds of a single picture")
    sizes = [(line["width"], line["height"]) for line in single]
    size = max(sizes, key=sizes.count)
    bars = [line for line in single if (line["width"], line["height"]) == size]
    return sorted(bars, key=lambda line: -line["seconds"]), size


if __name__ == "__main__":
    sys.exit(main())
