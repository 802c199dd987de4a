"""What stays on the GPU, for a given amount of its memory: the fastest plan that fits.

Arithmetic on bytes; no torch. Knows nothing of files, of requests or of how weights are moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from krea_local.errors import InvalidRequest, OutOfMemory
from krea_local.schema import MAX_INPUT_PIXELS

if TYPE_CHECKING:
    from krea_local.memory import Offload

GIB = 2**30
# cuBLAS's and cuDNN's workspaces, what the allocator rounds up, the safety checker's activations.
RESERVE = GIB // 4
# A step has so many matrices [tokens, D] at once: 0.46 GiB at 1 megapixel, counted in a single
# block, of which the fused product alone takes 7 and its result 5.
MATRICES = 17.5
TEXT_TOKENS = 512
PIXELS_A_TOKEN = 256
# The VAE's largest maps are of the picture's size. Bytes a pixel; as those below, in bfloat16:
ENCODING = 2 * 3 * 128  # three maps of 128 channels, as `vae.encode` holds them
DECODING = 2 * 3 * 256  # three of 256, up to where the decoder works in strips
KEPT = 2 * 128  # one of 128, which strips have to keep
STRIPS_ABOVE = 2 * 2**20  # pixels; more is kept there than has to be, since that spares arithmetic
KEPT_ABOVE = GIB
STRIPS = 4 * 2**26  # as many live at a time
PASSES = 16  # over all rows in a block, beside the products: 12 in a double, 18 in a single one
ATTENTION = 0.8  # of the rate of products, that the best attention reaches
TABLES = 80 * 10**6  # modulation of all steps and blocks
PLACES = 3  # of streamed blocks
UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights.

    Attributes:
        blocks: of each block of the transformer, without modulation.
        numbers: how many numbers those are, of each block.
        a_token: how many of them one token meets; in double blocks text and image have half each.
        outside: of the transformer's layers outside blocks, without modulation.
        modulation: all of it.
        t5_blocks: of each block of T5.
        t5_outside: of T5's other layers.
        text_encoder: CLIP.
        vae: all of it.
        safety_checker: all of it.
        row: of one token [D] between blocks.
        itemsize: of a number; 2 in bfloat16.
        scratch: what widening a packed layer takes, where there are such.
        eight_bit: whether the blocks' weights are in the 8 bits that levels multiply, which then
            need no others, but for LoRAs.
    """

    blocks: tuple[int, ...]
    numbers: tuple[int, ...]
    a_token: int
    outside: int
    modulation: int
    t5_blocks: tuple[int, ...]
    t5_outside: int
    text_encoder: int
    vae: int
    safety_checker: int
    row: int
    itemsize: int = 2
    scratch: int = 0
    eight_bit: bool = False

    @property
    def t5(self) -> int:
        """All of T5."""
        return sum(self.t5_blocks) + self.t5_outside

    @property
    def everything(self) -> int:
        """All weights but the safety checker's."""
        transformer = sum(self.blocks) + self.outside + self.modulation
        return transformer + self.t5 + self.text_encoder + self.vae


# The 12 B model in bfloat16: 19 double blocks of 24 D² weights and their biases and norms, 38
# single ones of 12 D²; as many as its original file holds, and as the published files of the rest.
BLOCKS = (453_096_448,) * 19 + (226_542_080,) * 38
FLUX1 = Sizes(
    blocks=BLOCKS,
    numbers=tuple(size // 2 for size in BLOCKS),
    a_token=sum(BLOCKS[:19]) // 4 + sum(BLOCKS[19:]) // 2,
    outside=90_488_960,
    modulation=6_494_896_128,
    t5_blocks=(385_900_000,) * 24,
    t5_outside=263_200_000,
    text_encoder=246_200_000,
    vae=167_600_000,
    safety_checker=343_000_000,
    row=2 * 3072,
)


@dataclass(frozen=True)
class Rates:
    """How fast a GPU is, each a second.

    Attributes:
        copying: bytes from locked host memory.
        memory: bytes of its own memory, read or written.
        products: operations of matrix products in the model's precision.
        eight_bit: of those in the 8 bits that levels multiply; None if it has none.
    """

    copying: float
    memory: float
    products: float
    eight_bit: float | None = None


@dataclass(frozen=True)
class Plan:
    """One way to share the GPU's memory.

    Attributes:
        sizes: of the model.
        offload: what takes turns.
        resident: blocks of the transformer that stay there, with offload "blocks".
        t5_resident: blocks of T5 that do, once all of the transformer's do.
        budget: bytes that there are; None for as many as it takes.
        pixels: of the images that it is made for.
        batch: images that are denoised together.
        eight_bit: whether the blocks are also needed in 8 bits.
        adapters: bytes of LoRAs, which stay there.
        strips: whether pictures of any size are decoded in strips, which rounds otherwise.
        packed: whether weights stay in the fewer bits of their files, of which `sizes` then are.
        rates: of the GPU, if they are known.
    """

    sizes: Sizes
    offload: Offload = "none"
    resident: int = 0
    t5_resident: int = 0
    budget: int | None = None
    pixels: int = 2**20
    batch: int = 1
    eight_bit: bool = False
    adapters: int = 0
    strips: bool = False
    packed: bool = False
    rates: Rates | None = None

    @property
    def streamed(self) -> int:
        """Bytes that cross the bus at every step."""
        return _visiting(self.sizes.blocks, self.resident) if self.offload == "blocks" else 0

    @property
    def t5_streamed(self) -> int:
        """Bytes of T5's blocks that cross the bus at every new prompt."""
        blocks = self.sizes.t5_blocks
        return _visiting(blocks, self.t5_resident) if self.offload == "blocks" else 0

    @property
    def host(self) -> int:
        """Bytes of weights in host memory."""
        sizes = self.sizes
        if self.offload in ("none", "modulation"):
            return sizes.modulation if self.offload == "modulation" else 0
        return sizes.everything + self._eight_bit

    @property
    def _eight_bit(self) -> int:
        """Bytes of the blocks in 8 bits, where they are needed beside the others."""
        needed = not self.sizes.eight_bit or self.adapters  # LoRAs are added to copies
        return sum(self.sizes.numbers) if self.eight_bit and needed else 0

    @property
    def stages(self) -> dict[str, int]:
        """Bytes on the GPU at most, by what is done there."""
        sizes = self.sizes
        rows = self._rows
        denoising = int(MATRICES * rows * sizes.row) + TABLES * sizes.itemsize // 2
        encoding = ENCODING * min(self.pixels, MAX_INPUT_PIXELS) * sizes.itemsize // 2
        decoding = self._decoding * sizes.itemsize // 2
        if self.offload in ("none", "modulation"):
            kept = sum(sizes.blocks) + sizes.outside + sizes.t5 + sizes.text_encoder
            kept += sizes.vae + sizes.safety_checker + RESERVE + self.adapters
            kept += sizes.modulation if self.offload == "none" else 0
            # Where blocks visit the GPU, those in 8 bits come instead of the others.
            kept += self._eight_bit
            return {
                "text": kept + sizes.scratch,
                "encode": kept + encoding,
                "denoise": kept + sizes.scratch + denoising,
                "decode": kept + decoding,
            }
        kept = sizes.safety_checker + RESERVE + self.adapters
        places = 0
        if self.offload == "blocks":
            kept += sum(sizes.blocks) - self.streamed + sum(sizes.t5_blocks) - self.t5_streamed
            places = _places(sizes.blocks, self.resident)
            text = sizes.t5_outside + _places(sizes.t5_blocks, self.t5_resident)
        else:
            places, text = sum(sizes.blocks), sizes.t5
        return {
            "text": kept + text + sizes.text_encoder + sizes.scratch,
            "encode": kept + sizes.vae + encoding,
            "denoise": kept + sizes.outside + places + sizes.scratch + denoising,
            "decode": kept + sizes.vae + decoding,
        }

    @property
    def computing(self) -> float | None:
        """Seconds that a step computes, about."""
        if self.rates is None:
            return None
        sizes, rates = self.sizes, self.rates
        width, tokens, count = (
            sizes.row // sizes.itemsize,
            self._rows // self.batch,
            len(sizes.blocks),
        )
        products = 2 * self._rows * sizes.a_token
        attention = 4 * self.batch * tokens**2 * width * count
        passes = PASSES * count * self._rows * sizes.row
        rate = rates.eight_bit if self.eight_bit else None
        if self.packed and not self.eight_bit:
            # Codes are read and numbers written, which the product reads.
            passes += sum(sizes.blocks) + 2 * sizes.itemsize * sum(sizes.numbers)
        return (
            products / (rate or rates.products)
            + attention / (ATTENTION * rates.products)
            + passes / rates.memory
        )

    @property
    def copying(self) -> float | None:
        """Seconds that a step copies, while it computes."""
        return None if self.rates is None else self.streamed / self.rates.copying

    @property
    def _rows(self) -> int:
        return self.batch * (TEXT_TOKENS + self.pixels // PIXELS_A_TOKEN)

    @property
    def _decoding(self) -> int:
        if self.strips:
            return KEPT * self.pixels + STRIPS
        if self.pixels > STRIPS_ABOVE:
            return max(KEPT * self.pixels, KEPT_ABOVE) + STRIPS
        return DECODING * self.pixels

    @property
    def peak(self) -> int:
        """Bytes on the GPU at most."""
        return max(self.stages.values())

    def for_blocks(self, blocks: Sequence[int]) -> Plan:
        """The same budget for a transformer whose blocks have other sizes, such as in 8 bits."""
        sizes = replace(self.sizes, blocks=tuple(blocks))
        same = replace(self, sizes=sizes)
        if self.offload != "blocks" or self.budget is None or self.strips:
            return same
        fitting = [plan for plan in _with_blocks(same) if plan.peak <= self.budget]
        return fitting[0] if fitting else replace(same, resident=0, t5_resident=0)

    def smaller(self) -> Plan | None:
        """The next plan that takes less, by some blocks at a time; None if there is none."""
        plans = list(options(self))
        place = plans.index(self)
        step = max(len(self.sizes.blocks) // 8, 1) if self.offload == "blocks" else 1
        later = [*plans[place + step :], *plans[-2:]]  # no block stays; strips as well
        less = [plan for plan in later if plan.peak < self.peak]
        return replace(less[0], budget=less[0].peak) if less else None

    @property
    def in_eight_bit(self) -> Plan:
        """Where the blocks that visit the GPU are in 8 bits, what stays there then."""
        own = self.sizes.eight_bit or not self.eight_bit
        return self if own else self.for_blocks(self.sizes.numbers)

    def __str__(self) -> str:
        """A table: part, where, bytes; what a step takes; and what would be faster."""
        shown = self.in_eight_bit if self.offload == "blocks" else self
        lines = shown._lines()
        if self.reasons:
            lines.append(f"{'why':17}{'; '.join(self.reasons)}")
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        sizes, streams = self.sizes, self.offload == "blocks"
        kept = {True: "stays on the GPU", False: "visits it"}
        all_stay = self.offload in ("none", "modulation")
        rows = [
            ("transformer", sum(sizes.blocks) + sizes.outside, kept[all_stay]),
            ("  its modulation", sizes.modulation, "visits it, once an image"),
            ("T5", sizes.t5, "visits it block by block" if streams else kept[all_stay]),
            ("CLIP", sizes.text_encoder, kept[all_stay]),
            ("VAE", sizes.vae, kept[all_stay]),
            ("safety checker", sizes.safety_checker, kept[True]),
        ]
        if self.offload == "none":
            rows[1] = (*rows[1][:2], kept[True])
        if all_stay and self._eight_bit:
            rows.insert(1, ("  and in 8 bits", self._eight_bit, kept[True]))
        if streams:
            count, t5_count = len(sizes.blocks), len(sizes.t5_blocks)
            said = f"{self.resident} of {count} blocks stay, the others visit it at every step"
            rows[0] = (*rows[0][:2], said if self.resident < count else kept[True])
            if self.t5_resident:
                said = f"{self.t5_resident} of {t5_count} blocks stay, the others visit it"
                rows[2] = (*rows[2][:2], said if self.t5_resident < t5_count else kept[True])
        if self.strips:
            rows[4] = (*rows[4][:2], f"{rows[4][2]}, and decodes in strips")
        lines = [f"{name:17}{_said(size):>10}  {where}" for name, size, where in rows]
        lines += [f"{'peak, ' + name:17}{_said(size):>10}" for name, size in self.stages.items()]
        if self.adapters:
            lines.append(f"{'LoRAs':17}{_said(self.adapters):>10}  {kept[True]}")
        if self.budget is not None:
            lines.append(f"{'of':17}{_said(self.budget):>10}  ({self.budget / 1e9:.2f} GB)")
        if self.streamed:
            lines.append(f"{'copied a step':17}{_said(self.streamed):>10}")
        computing, copying = self.computing, self.copying
        if computing is not None and copying is not None:
            what = "copying sets the pace" if copying > computing else "copying is hidden by it"
            what = f"computes {computing:.2f} s, copies {copying:.2f} s: {what}" if copying else ""
            lines.append(f"{'a step, about':17}{max(computing, copying):8.2f} s  {what}".rstrip())
        if self.packed:
            lines.append(f"{'weights':17}packed, as in their files")
        return lines

    @property
    def reasons(self) -> list[str]:
        """What would be faster, and how much it would take."""
        found: dict[str, int] = {}
        ways = {"none": "all on the GPU", "modulation": "all but modulation"}
        shown = self.in_eight_bit
        streamed = [one for one in options(shown) if one.offload == "blocks"]
        for plan in (*(one for one in options(self) if one.offload != "blocks"), *streamed):
            if self.budget is None or plan.peak <= self.budget:
                break
            if plan.streamed or (plan.t5_streamed and not shown.streamed):
                continue
            blocks = "the transformer's blocks" if plan.t5_streamed else "all blocks"
            way = ways.get(plan.offload, blocks)
            found[way] = min(found.get(way, plan.peak), plan.peak)
        return [f"{way} would take {_said(peak)}" for way, peak in found.items()]


def options(plan: Plan) -> Iterator[Plan]:
    """Every plan for a model that is worth its memory, the fastest first.

    Strips come last, with no block that stays: they change the rounding of pixels, and would only
    make room for a block or two.
    """
    plan = replace(plan, resident=0, t5_resident=0, strips=False)
    yield replace(plan, offload="none")
    yield replace(plan, offload="modulation")
    yield from _with_blocks(plan)
    yield replace(plan, offload="blocks", strips=True)


def _with_blocks(plan: Plan) -> list[Plan]:
    count, t5_count = len(plan.sizes.blocks), len(plan.sizes.t5_blocks)
    staying = [(resident, 0) for resident in range(count)]
    staying += [(count, resident) for resident in range(t5_count + 1)]
    plans = [
        replace(plan, offload="blocks", resident=resident, t5_resident=t5_resident)
        for resident, t5_resident in staying
    ]
    return sorted(plans, key=lambda one: (one.streamed, one.t5_streamed, one.peak))


def _visiting(blocks: Sequence[int], resident: int) -> int:
    """Bytes of the blocks that visit the GPU where so many stay."""
    return sum(blocks[i] for i in visitors(len(blocks), resident))


def _places(blocks: Sequence[int], resident: int) -> int:
    """Bytes of the places for those that visit it."""
    return min(PLACES, len(blocks) - resident) * max(blocks, default=0)


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` places, as evenly as can be, so that copies never come in a row."""
    return [(2 * k + 1) * count // (2 * chosen) for k in range(chosen)]


def visitors(count: int, resident: int) -> list[int]:
    """Which of `count` blocks visit the GPU where so many stay.

    The first one to stay is block 0: a step that is skipped takes that one alone, while the copies
    for the next step are under way, and the next step takes it again.
    """
    if resident == 0:
        return list(range(count))
    return [1 + place for place in spread(count - 1, count - resident)]


def choose(
    sizes: Sizes,
    budget: int,
    *,
    packed: Sizes | None = None,
    always: bool = False,
    host: int | None = None,
    pixels: int = 2**20,
    batch: int = 1,
    eight_bit: bool = False,
    asked: str = "memory",
    way_out: str = "free the GPU",
) -> Plan:
    """The fastest plan that takes no more than `budget` bytes.

    Args:
        sizes: of the model.
        budget: bytes that there are.
        packed: of the model with weights in the fewer bits of their files, if it can be had so.
        always: rather so, whatever fits.
        host: bytes that there are in host memory; None for as many as it takes.
        pixels: of the images.
        batch: images that are denoised together.
        eight_bit: whether the blocks are also needed in 8 bits.
        asked: what an error calls the budget.
        way_out: what an error says to do, if it is too little.

    Raises:
        OutOfMemory: none does; says what the smallest one needs.
    """
    model = Plan(sizes, budget=budget, pixels=pixels, batch=batch, eight_bit=eight_bit)
    plans = list(options(model))
    if packed is not None:
        # Widening costs each step some passes over the weights, less than copying them; and
        # nothing at levels that multiply them as they are.
        always = always or (eight_bit and packed.eight_bit)
        wide = [plan for plan in plans if not (plan.streamed or plan.strips or always)]
        plans = [*wide, *options(replace(model, sizes=packed, packed=True))]
    fitting = [plan for plan in plans if plan.peak <= budget]
    for plan in fitting:
        if host is None or plan.host <= host:
            return plan
    if fitting:
        least = min(fitting, key=lambda plan: plan.host)
        raise OutOfMemory(
            f"{asked}: {_said(budget)} on the GPU do not hold the model; it has to be in host "
            f"memory, which takes {least.host / GIB:.1f} GiB and has {(host or 0) / GIB:.1f} "
            "available: free some of either, or take files of fewer bits (weights.md)"
        )
    least = min(plans, key=lambda plan: plan.peak)
    stage = max(least.stages, key=lambda name: least.stages[name])
    raise OutOfMemory(
        f"{asked}: {_said(budget)} are too little: at {pixels / 2**20:.1f} megapixels the least is "
        f"{_said(least.peak)} ({least.peak / 1e9:.2f} GB), for the stage {stage!r}; {way_out}"
    )


def _said(nbytes: int) -> str:
    """So many bytes, in words."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def need(offload: Offload) -> float:
    """GiB of GPU memory that the 12 B model takes in bfloat16, one image at 1 megapixel."""
    return Plan(FLUX1, offload).peak / GIB


def parse_budget(memory: object) -> int:
    """Bytes, of a text such as "12GB" (10⁹) or "11.5 GiB" (2³⁰).

    Raises:
        InvalidRequest: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(memory))
    unit = UNITS.get(found[2].upper()) if found else None
    if (
        not isinstance(memory, str)
        or not found
        or unit is None
        or not float(found[1]) * unit < 2**60
    ):
        raise InvalidRequest(
            f"memory={memory!r}: should be 'auto', 'none' or an amount and its unit, such as "
            "'12GB' or '11.5GiB'"
        )
    return int(float(found[1]) * unit)
