"""Plans fit their budget, and more memory never makes a slower one."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import krea_local
from krea_local import InvalidRequest, KreaWarning, OutOfMemory, loading, rates, weights
from krea_local.plan import (
    FLUX1,
    GIB,
    Plan,
    Rates,
    Sizes,
    choose,
    options,
    parse_budget,
    spread,
    visitors,
)

FLOAT8 = tuple(size // 2 for size in FLUX1.blocks)
SIZE = {"width": 64, "height": 64}


def cost(plan: Plan) -> tuple[int, int]:
    """What crosses the bus: at every step, and once an image."""
    once = {"none": 0, "modulation": 1, "model": 2, "blocks": 2}[plan.offload]
    return plan.streamed, once


@given(
    budget=st.integers(GIB, 60 * GIB),
    more=st.integers(0, 8 * GIB),
    megapixels=st.sampled_from([0.25, 0.75, 1.0, 2.0, 4.0]),
    batch=st.integers(1, 4),
    float8=st.booleans(),
)
def test_a_plan_fits_its_budget_and_more_memory_is_never_slower(
    budget: int, more: int, megapixels: float, batch: int, float8: bool
) -> None:
    sizes = FLUX1 if not float8 else Sizes(**{**vars(FLUX1), "blocks": FLOAT8})
    pixels = int(megapixels * 2**20)
    try:
        plan = choose(sizes, budget, pixels=pixels, batch=batch)
    except OutOfMemory as error:
        assert "the least is" in str(error)
        least = min(one.peak for one in options(Plan(sizes, pixels=pixels, batch=batch)))
        assert budget < least
        return
    assert plan.peak <= budget
    assert plan.peak == max(plan.stages.values())
    assert cost(choose(sizes, budget + more, pixels=pixels, batch=batch)) <= cost(plan)


@pytest.mark.parametrize(
    ("gib", "offload", "resident"),
    [(40, "none", 0), (30, "modulation", 0), (24, "blocks", 57), (3.5, "blocks", 0)],
)
def test_what_usual_cards_get(gib: float, offload: str, resident: int) -> None:
    plan = choose(FLUX1, int(gib * GIB))
    assert (plan.offload, plan.resident) == (offload, resident or plan.resident)
    if resident:
        assert plan.resident == resident
        assert plan.streamed == 0
    said = str(plan)
    assert "GiB" in said
    assert ("copied a step" in said) == bool(plan.streamed)


def test_between_them_as_many_blocks_stay_as_fit() -> None:
    plans = [choose(FLUX1, gib * GIB) for gib in (4, 6, 8, 10, 12, 16)]
    counts = [plan.resident for plan in plans]
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts)
    for plan in plans:
        assert plan.budget is not None
        assert plan.budget - plan.peak < 1.2 * GIB  # no large part of the budget is left lying


def test_a_budget_below_the_least_says_what_that_is() -> None:
    with pytest.raises(OutOfMemory, match=r"1\.00 GiB are too little: .* the least is 2\.\d+ GiB"):
        choose(FLUX1, GIB)


def test_smaller_plans_end() -> None:
    plan: Plan | None = choose(FLUX1, 80 * GIB)
    peaks = []
    while plan is not None:
        peaks.append(plan.peak)
        plan = plan.smaller()
    assert len(peaks) > 10
    assert all(a > b for a, b in itertools.pairwise(peaks))
    assert peaks[-1] < 2.6 * GIB


def test_in_8_bits_more_blocks_stay() -> None:
    plan = choose(FLUX1, 10 * GIB)
    other = plan.for_blocks(FLOAT8)
    assert other.peak <= 10 * GIB
    assert other.streamed < plan.streamed / 3


def test_blocks_in_8_bits_are_counted_beside_the_others_where_all_stay() -> None:
    assert choose(FLUX1, 40 * GIB).offload == "none"
    both = choose(FLUX1, 40 * GIB, eight_bit=True)
    assert both.offload == "modulation"
    assert both.peak - choose(FLUX1, 30 * GIB).peak == sum(FLUX1.blocks) // 2


def test_spread() -> None:
    assert spread(4, 0) == []
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(9, 3) == [1, 4, 7]


def test_the_first_block_stays_first_and_the_others_visit_in_even_distances() -> None:
    for count in range(1, 30):
        assert visitors(count, 0) == list(range(count))
        for resident in range(1, count + 1):
            visiting = visitors(count, resident)
            assert len(set(visiting)) == count - resident
            assert all(0 < place < count for place in visiting)
            gaps = [b - a for a, b in itertools.pairwise(visiting)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("megapixels", [0.25, 1.0, 1.5, 2.0, 4.0])
def test_strips_are_for_budgets_that_nothing_else_meets(megapixels: float) -> None:
    pixels = int(megapixels * 2**20)
    *others, last = options(Plan(FLUX1, pixels=pixels))
    assert [plan.strips for plan in (*others, last)] == [False] * len(others) + [True]
    least = min(plan.peak for plan in others)
    assert not choose(FLUX1, least, pixels=pixels).strips
    if last.peak < least:  # where decoding sets the peak
        assert megapixels > 1
        assert choose(FLUX1, least - 1, pixels=pixels).strips
        assert "decodes in strips" in str(last)
    assert last.stages["decode"] <= others[-1].stages["decode"]
    # Nothing about image-to-image needs more than text-to-image does.
    assert all(plan.stages["encode"] < plan.peak for plan in (*others, last))


def test_a_smaller_plan_is_not_in_strips_before_it_must_be() -> None:
    plan: Plan | None = choose(FLUX1, 6 * GIB, pixels=2 * 2**20)
    seen = []
    while plan is not None:
        seen.append((plan.resident, plan.strips))
        plan = plan.smaller()
    assert seen[-2:] == [(0, False), (0, True)]
    assert all(resident for resident, _ in seen[:-2])


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * 10**9), ("11.5 GiB", int(11.5 * GIB)), (" 800mb", 8 * 10**8), ("7B", 7)],
)
def test_amounts(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize(
    "text", [12, None, "", "7", "GB", "-3GB", "12 apples", "1e9", "12,5GB", "9999999999GB"]
)
def test_amounts_that_are_none(text: object) -> None:
    with pytest.raises(InvalidRequest, match="should be 'auto', 'none' or an amount"):
        parse_budget(text)


def test_sizes_are_those_of_the_weights(tiny_folder: Path) -> None:
    krea = krea_local.load(tiny_folder, device="cpu", progress=False)
    sizes = loading.sizes(weights.find(tiny_folder), torch.float32)
    models = krea.models

    def total(*parts: torch.nn.Module) -> int:
        return sum({id(p): p.nbytes for part in parts for p in part.parameters()}.values())

    assert sum(sizes.blocks) + sizes.outside + sizes.modulation == total(models.transformer)
    assert sizes.modulation == total(*models.transformer.modulations())
    assert sizes.t5 == total(models.text_encoder_2)
    assert sizes.text_encoder == total(models.text_encoder)
    assert sizes.vae == total(models.vae)


def draw(krea: krea_local.Krea, **parameters: object) -> krea_local.Result:
    arguments = {"image_size": SIZE, "num_inference_steps": 3, "seed": 1} | parameters
    return krea.txt2img("a fox", **arguments)  # type: ignore[arg-type]


def test_load_makes_a_plan_and_the_picture_is_the_same(
    tiny_folder: Path, krea: krea_local.Krea
) -> None:
    whole = draw(krea).images[0].tobytes()
    plans = list(options(Plan(loading.sizes(weights.find(tiny_folder), torch.float32))))
    seen = set()
    for plan in plans:
        memory = f"{plan.peak}B"
        made = krea_local.load(tiny_folder, device="cpu", memory=memory, progress=False)
        assert made.plan is not None
        assert made.plan.peak <= plan.peak
        assert made.plan.strips == plan.strips
        seen.add((made.plan.offload, made.plan.resident))
        drawn = draw(made).images[0].tobytes()
        # Strips round otherwise: by one of 255 levels at most.
        assert all(abs(a - b) <= made.plan.strips for a, b in zip(drawn, whole, strict=True))
    assert {offload for offload, _ in seen} == {"none", "modulation", "blocks"}
    assert len(seen) > 3


def test_without_memory_or_with_none_there_is_no_plan(tiny_folder: Path) -> None:
    for memory in (None, "none"):
        made = krea_local.load(tiny_folder, device="cpu", memory=memory, progress=False)
        assert (made.plan, made.offload) == (None, "none")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"memory": "8GB", "offload": "none"}, "give one of the two"),
        ({"memory": "8GB", "engine": "diffusers"}, "is for engine='native'"),
        ({"memory": "auto"}, "is for a GPU"),
        ({"memory": "much"}, "should be 'auto', 'none' or an amount"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, str], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        krea_local.load("tiny", device="cpu", progress=False, **arguments)  # type: ignore[arg-type]


def test_a_call_that_runs_out_of_memory_is_repeated_with_a_smaller_plan(
    tiny_folder: Path, krea: krea_local.Krea
) -> None:
    wanted = draw(krea).images[0].tobytes()
    made = krea_local.load(tiny_folder, device="cpu", memory="8GB", progress=False)
    plans = [made.plan]
    fails = 3

    def exhausted(progress: krea_local.Progress) -> None:
        nonlocal fails
        if progress.step == 2 and fails:
            fails -= 1
            plans.append(made.plan)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    with pytest.warns(KreaWarning, match="memory did not suffice: from now on less"):
        drawn = draw(made, on_step=exhausted)
    assert drawn.images[0].tobytes() == wanted
    assert len([notice for notice in drawn.notices if "did not suffice" in notice]) == 3
    peaks = [plan.peak for plan in [*plans[1:], made.plan] if plan]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert made.offload == "blocks"
    again = draw(made)  # it stays so, and is said once
    assert again.images[0].tobytes() == wanted
    assert not again.notices


def test_where_no_plan_is_smaller_the_error_stands(tiny_folder: Path) -> None:
    made = krea_local.load(tiny_folder, device="cpu", memory="8GB", progress=False)

    def exhausted(progress: krea_local.Progress) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    with pytest.raises(OutOfMemory):
        draw(made, on_step=exhausted)
    assert made.offload == "blocks"
    assert made.plan is not None
    assert made.plan.streamed == 0  # as much stays as there was room for before
    assert draw(made).images


def test_running_out_of_host_memory_is_no_reason_for_another_plan(tiny_folder: Path) -> None:
    made = krea_local.load(tiny_folder, device="cpu", memory="8GB", progress=False)

    def exhausted(progress: krea_local.Progress) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory):
        draw(made, on_step=exhausted)
    assert made.offload == "none"


def test_too_little_host_memory_is_told_before_anything_is_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krea_local import memory

    sizes = loading.sizes(weights.find(tiny_folder), torch.float32)
    least = min(plan.peak for plan in options(Plan(sizes)))
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1000)
    with pytest.raises(
        OutOfMemory, match=r"host memory, which takes .* GiB and has 0\.0 available"
    ):
        krea_local.load(tiny_folder, device="cpu", memory=f"{least}B", progress=False)


def halved(sizes: Sizes) -> Sizes:
    """The same model from a file of 8-bit floats."""
    blocks = tuple(size // 2 for size in sizes.blocks)
    return replace(
        sizes, blocks=blocks, modulation=sizes.modulation // 2, scratch=GIB // 4, eight_bit=True
    )


def test_once_all_of_the_transformer_stays_blocks_of_t5_do() -> None:
    plans = [choose(FLUX1, int(gib * GIB)) for gib in (17, 18.5, 20, 22, 24, 26)]
    staying = [(plan.resident, plan.t5_resident) for plan in plans]
    assert staying == sorted(staying)
    assert staying[0][0] < 57
    assert [resident for resident, _ in staying[1:]] == [57] * 5
    assert len({t5 for _, t5 in staying[1:]}) == 5
    assert all(plan.peak <= (plan.budget or 0) for plan in plans)
    assert all("of 24 blocks stay" in str(plan) for plan in plans[2:])


@pytest.mark.parametrize(
    ("gib", "packed", "streams"),
    [(40, False, False), (22, False, False), (15, True, False), (11, True, False), (8, True, True)],
)
def test_weights_stay_packed_where_wide_ones_would_have_to_visit(
    gib: float, packed: bool, streams: bool
) -> None:
    plan = choose(FLUX1, int(gib * GIB), packed=halved(FLUX1))
    assert (plan.packed, bool(plan.streamed)) == (packed, streams)
    assert plan.streamed <= choose(FLUX1, int(gib * GIB)).streamed / (2 if packed else 1)
    assert choose(FLUX1, int(gib * GIB), packed=halved(FLUX1), always=True).packed


def test_levels_in_8_bits_take_a_files_own_and_need_no_others() -> None:
    plan = choose(FLUX1, 40 * GIB, packed=halved(FLUX1), eight_bit=True)
    assert plan.packed
    assert plan == replace(
        choose(FLUX1, 40 * GIB, packed=halved(FLUX1), always=True), eight_bit=True
    )
    other = replace(halved(FLUX1), eight_bit=False)  # of 8 bits, but no floats
    beside = choose(FLUX1, 40 * GIB, packed=other, always=True, eight_bit=True)
    assert beside.peak - plan.peak == sum(FLUX1.numbers)


@given(
    budget=st.integers(3 * GIB, 40 * GIB),
    host=st.integers(2 * GIB, 60 * GIB),
    float8=st.booleans(),
)
def test_a_plan_takes_no_more_host_memory_than_there_is(
    budget: int, host: int, float8: bool
) -> None:
    try:
        plan = choose(FLUX1, budget, packed=halved(FLUX1), host=host, eight_bit=float8)
    except OutOfMemory as error:
        needed = re.search(r"host memory, which takes ([\d.]+) GiB and has", str(error))
        assert needed
        assert host < (float(needed[1]) + 0.1) * GIB
        assert float(needed[1]) < 20.5  # of packed weights
        return
    assert plan.host <= host
    assert plan.peak <= budget
    assert plan.host == (
        0
        if plan.offload == "none"
        else plan.sizes.modulation
        if plan.offload == "modulation"
        else plan.sizes.everything
    )


H200 = Rates(copying=55e9, memory=4.2e12, products=700e12)


def test_a_step_is_reckoned_from_what_the_gpu_does_a_second() -> None:
    whole = replace(choose(FLUX1, 80 * GIB), rates=H200)
    # 59.5 TFLOP in linears, 14.9 in attention: performance.md's count of one step.
    linears, attention = 59.5e12 / 700e12, 14.9e12 / (0.8 * 700e12)
    assert whole.computing == pytest.approx(linears + attention + 0.006, rel=0.01)
    assert whole.copying == 0
    assert "a step, about" in str(whole)
    assert "copies" not in str(whole)
    small = replace(choose(FLUX1, 5 * GIB), rates=H200)
    assert small.computing == whole.computing
    assert small.copying == pytest.approx(small.streamed / 55e9)
    assert small.copying > whole.computing
    assert "copying sets the pace" in str(small)
    packed = replace(choose(FLUX1, 11 * GIB, packed=halved(FLUX1)), rates=H200)
    assert packed.packed
    # Half of 17 GB read, 17 written, and read once more: 10 ms.
    assert packed.computing == pytest.approx(whole.computing + 0.0102, rel=0.01)
    assert "packed, as in their files" in str(packed)
    assert "a step, about" not in str(choose(FLUX1, 5 * GIB))


def test_a_plan_says_what_would_be_faster() -> None:
    assert choose(FLUX1, 80 * GIB).reasons == []
    assert choose(FLUX1, 10 * GIB).reasons == [
        f"all on the GPU would take {Plan(FLUX1).peak / GIB:.2f} GiB",
        f"all but modulation would take {Plan(FLUX1, 'modulation').peak / GIB:.2f} GiB",
        "all blocks would take 26.89 GiB",
        "the transformer's blocks would take 18.26 GiB",
    ]
    assert len(choose(FLUX1, 20 * GIB).reasons) == 3
    assert "why" in str(choose(FLUX1, 10 * GIB))


def test_rates_are_measured_and_none_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for eight_bit in (None, torch.float8_e4m3fn, torch.int8):
        found = rates.measure(cpu, torch.float32, eight_bit, nbytes=2**20, tokens=16)
        assert found is not None
        assert min(rate for rate in vars(found).values() if rate is not None) > 1e6
        assert (found.eight_bit is None) == (eight_bit is None)

    def exhausted(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(torch, "empty_like", exhausted)
    assert rates.measure(cpu, torch.float32) is None


def test_a_plan_for_8_bits_tells_of_them() -> None:
    fast = replace(H200, eight_bit=1250e12)
    plan = replace(choose(FLUX1, 8 * GIB, eight_bit=True), rates=fast)
    other = replace(choose(FLUX1, 8 * GIB), rates=fast)
    assert plan.streamed == other.streamed  # as it is loaded
    shown = plan.in_eight_bit
    assert shown.streamed < plan.streamed / 2
    assert str(plan).splitlines()[:-1] == str(shown).splitlines()[:-1]
    assert str(plan) != str(other)
    half = replace(halved(FLUX1), scratch=0)
    wanted = {
        "all on the GPU": Plan(FLUX1, eight_bit=True),  # in both precisions
        "all but modulation": Plan(FLUX1, "modulation", eight_bit=True),
        "all blocks": Plan(half, "blocks", 57, 24),
        "the transformer's blocks": Plan(half, "blocks", 57, 0),
    }
    assert plan.reasons == [
        f"{name} would take {one.peak / GIB:.2f} GiB" for name, one in wanted.items()
    ]
    assert "and in 8 bits" in str(choose(FLUX1, 60 * GIB, eight_bit=True))
    assert plan.computing is not None
    assert other.computing is not None
    saved = 59.5e12 * (1 / 700e12 - 1 / 1250e12)
    assert other.computing - plan.computing == pytest.approx(saved, rel=1e-3)
    packed = replace(choose(FLUX1, 11 * GIB, packed=halved(FLUX1), eight_bit=True), rates=fast)
    assert packed.in_eight_bit == packed
    assert packed.computing == plan.computing  # nothing is widened


def test_other_packed_weights_are_for_8_bits_what_wide_ones_are() -> None:
    other = replace(halved(FLUX1), eight_bit=False)  # Q8_0, say
    assert not choose(FLUX1, 140 * GIB, packed=other, eight_bit=True).packed
    assert choose(FLUX1, 140 * GIB, packed=halved(FLUX1), eight_bit=True).packed


def test_loras_in_8_bits_are_counted_as_copies() -> None:
    plan = Plan(halved(FLUX1), packed=True, eight_bit=True)
    with_loras = replace(plan, adapters=100)
    assert with_loras.peak - plan.peak == sum(FLUX1.numbers) + 100
    streamed = replace(plan, offload="blocks")
    assert replace(streamed, adapters=100).host - streamed.host == sum(FLUX1.numbers)
