"""What `evaluate` found, as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.miniature.tally import Row
from krea_local.recipe import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Part: what lies across, whether in doublings, and which shares lie upwards.
PANELS = {
    "guidance": ("guidance_scale", True, ("adherence", "colours", "shapes", "everything")),
    "strength": ("strength", False, ("adherence", "adherence_to_input")),
    "steps": ("steps", True, ("adherence", "colours", "shapes", "everything")),
    "thresholds": ("threshold", True, ("adherence", "psnr", "computed")),
}


def draw(parts: Mapping[str, Sequence[Row]], picture: Path) -> None:
    """Write the PNG file `picture`, with a panel for each of the parts in `PANELS`."""
    from matplotlib.figure import Figure

    shown = [name for name in PANELS if name in parts]
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _panel(axes, name, parts[name])
    file = BytesIO()
    figure.savefig(file, dpi=110, format="png")
    write_atomically(file.getvalue(), picture, overwrite=True)


def _panel(axes: Axes, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
    across, doublings, shares = PANELS[part]
    places = [row[across] for row in rows]
    for share in shares:
        label = {"psnr": "PSNR, dB", "computed": "steps computed"}.get(share, f"{share}, %")
        axes.plot(places, [row[share] for row in rows], marker="o", markersize=3, label=label)
    if doublings:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_title(f"{part}: {rows[0]['pictures']} pictures a point", fontsize=9)
    axes.set_xlabel(across.replace("_", " "))
    axes.legend(fontsize=7.5)
    axes.grid(alpha=0.3)
