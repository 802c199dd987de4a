"""Verdicts on many pictures, as figures. Knows nothing of how they were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.miniature.judge import Verdict
from benchmarks.miniature.scenes import HELD_OUT, Scene

Row = dict[str, Any]


@dataclass
class Tally:
    """Pictures, judged."""

    judged: list[tuple[Verdict, Scene]] = field(default_factory=list)

    def add(self, verdict: Verdict, scene: Scene) -> None:
        self.judged.append((verdict, scene))

    def of(self, things: int) -> Tally:
        """Those of scenes of so many things."""
        return Tally([one for one in self.judged if len(one[1].things) == things])

    def figures(self) -> Row:
        """Shares in percent.

        `ground`, `place` (which takes the right count), `everything`: of pictures. `colours` (of
        grounds and things together), `shapes`, `sizes`: of what was asked for. `held_out_shapes`:
        of things alone whose shape and colour were never seen together. `place_of_several`: of
        pictures of two and three things. `adherence`: the mean share of a picture that is right.
        """
        verdicts = [verdict for verdict, _ in self.judged]
        held_out = [
            right
            for verdict, scene in self.judged
            for right, thing in zip(verdict.shapes, scene.things, strict=True)
            if (thing.shape, thing.colour) in HELD_OUT
        ]
        several = [one.place for one in verdicts if len(one.shapes) > 1]
        made = {
            "pictures": len(verdicts),
            "ground": percent([one.ground for one in verdicts]),
            "colours": percent([right for one in verdicts for right in (one.ground, *one.colours)]),
            "shapes": percent([right for one in verdicts for right in one.shapes]),
            "sizes": percent([right for one in verdicts for right in one.sizes]),
            "place": percent([one.place for one in verdicts]),
            "everything": percent([one.all for one in verdicts]),
            "adherence": round(sum(map(adherence, verdicts)) / len(verdicts), 2),
        }
        if held_out:
            made["held_out_shapes"] = percent(held_out)
        if several:
            made["place_of_several"] = percent(several)
        return made


def percent(right: Sequence[bool]) -> float:
    """The share that is true."""
    return round(100 * sum(right) / len(right), 2)


def adherence(verdict: Verdict) -> float:
    """The share of what is right in a picture, 0 … 100."""
    things = verdict.colours + verdict.shapes + verdict.sizes
    checks = (verdict.ground, verdict.count, verdict.place, *things)
    return 100 * sum(checks) / len(checks)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "---|" * len(names))
    lines += [
        "| " + " | ".join("" if row.get(name) is None else str(row[name]) for name in names) + " |"
        for row in rows
    ]
    return "\n".join(lines)
