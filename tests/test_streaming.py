"""Blocks that visit the device: never used before they are there, never overwritten in use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from krea_local.plan import spread
from krea_local.streaming import AHEAD, BlockStream

CPU = torch.device("cpu")


def blocks_of(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 5 + i % 3), nn.Linear(5 + i % 3, 3)) for i in range(count)]


@dataclass
class Recorded:
    """A lane whose copies and whose computation are only written down; see `replay`."""

    copies: list[tuple[int, int, int | None]] = field(default_factory=list)  # place, block, after
    work: list[tuple[str, int, int]] = field(default_factory=list)  # "wait"/"mark"/"use", …
    sources: dict[int, int] = field(default_factory=dict)
    marks: int = 0

    def copy(self, target: Tensor, source: Tensor, after: int | None) -> int:
        self.copies.append((target.data_ptr(), self.sources[source.data_ptr()], after))
        target.copy_(source)  # so that the bytes are right too
        return -len(self.copies)  # marks of copies are negative

    def wait(self, mark: int) -> None:
        self.work.append(("wait", mark, 0))

    def mark(self) -> int:
        self.marks += 1
        self.work.append(("mark", self.marks, 0))
        return self.marks

    def drain(self) -> None:
        self.work.append(("wait", -len(self.copies), 0))


def replay(lane: Recorded, random: Random) -> None:
    """Run both streams in some order that their marks allow, and see that every use is right."""
    holds: dict[int, int | None] = {}
    passed: set[int] = set()
    copying: int | None = None
    using: tuple[int, int] | None = None
    copies, work = iter(lane.copies), iter(lane.work)
    copy, job = next(copies, None), next(work, None)
    done = 0
    while copy or job:
        choices = []
        if copy and (copying is not None or copy[2] is None or copy[2] in passed):
            choices.append("copy")
        if job and (job[0] != "wait" or job[1] in passed or job[1] == 0):
            choices.append("job")
        assert choices, "the two wait for each other"
        if random.choice(choices) == "copy":
            assert copy
            place, block, _ = copy
            if copying is None:  # begins
                assert using is None or using[0] != place, f"block {using} is overwritten in use"
                copying, holds[place] = place, None
            else:  # ends
                holds[place], copying = block, None
                done += 1
                passed.add(-done)
                copy = next(copies, None)
        else:
            assert job
            kind, one, two = job
            if kind == "mark":
                passed.add(one)
            elif kind == "use" and using is None:  # begins
                using = (one, two)
                assert holds.get(one) == two, f"block {two} is used, {holds.get(one)} is there"
                continue
            elif kind == "use":  # ends
                assert holds[one] == two
                using = None
            job = next(work, None)


def run(stream: BlockStream, blocks: list[nn.Module], lane: Recorded, rounds: list[int]) -> None:
    for last in rounds:  # a round ends early where a step is skipped
        for i in range(min(last, len(blocks))):
            with stream.block(i):
                weight = next(blocks[i].parameters())
                if i in stream.streamed:
                    lane.work.append(("use", weight.data_ptr(), i))


@given(
    count=st.integers(1, 12),
    resident=st.integers(0, 12),
    rounds=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_in_whatever_order_two_streams_run_every_block_is_there_when_used(
    count: int, resident: int, rounds: list[int], seed: int
) -> None:
    blocks = blocks_of(count)
    lane = Recorded()
    stream = BlockStream(
        [[block] for block in blocks], CPU, resident=min(resident, count), lane=lane
    )
    lane.sources = {home.data_ptr(): i for i, home in enumerate(stream.homes)}
    with stream.open():
        run(stream, blocks, lane, rounds)
    replay(lane, Random(seed))
    assert all(place != home for place, _, _ in lane.copies for home in lane.sources)


def test_the_replay_finds_a_block_that_is_overwritten_or_not_there() -> None:
    def replay_often(lane: Recorded) -> None:
        for seed in range(50):
            replay(lane, Random(seed))

    early = Recorded(copies=[(1, 0, None), (1, 1, None)], work=[("wait", -1, 0), ("use", 1, 0)])
    with pytest.raises(AssertionError, match="overwritten|is there"):
        replay_often(early)
    with pytest.raises(AssertionError, match="is there"):
        replay_often(Recorded(copies=[(1, 0, None)], work=[("use", 1, 0)]))


def test_two_blocks_are_on_their_way_while_one_works() -> None:
    blocks = blocks_of(10)
    lane = Recorded()
    stream = BlockStream([[block] for block in blocks], CPU, lane=lane)
    lane.sources = {home.data_ptr(): i for i, home in enumerate(stream.homes)}
    asked = []
    with stream.open():
        for i in range(10):
            with stream.block(i):
                asked.append({block for _, block, _ in lane.copies})
    for i, blocks_asked in enumerate(asked[:-AHEAD]):
        assert {i + ahead for ahead in range(AHEAD + 1)} <= blocks_asked
    # Each was copied once; then the next round's first ones.
    assert [block for _, block, _ in lane.copies] == [*range(10), 0, 1, 2]


@pytest.mark.parametrize("resident", [1, 4])
def test_where_blocks_stay_a_skipped_step_copies_nothing(resident: int) -> None:
    blocks = blocks_of(10)
    lane = Recorded()
    stream = BlockStream([[block] for block in blocks], CPU, resident=resident, lane=lane)
    lane.sources = {home.data_ptr(): i for i, home in enumerate(stream.homes)}
    with stream.open():
        run(stream, blocks, lane, [10])
        copies = len(lane.copies)
        run(stream, blocks, lane, [1, 1, 1])  # of a skipped step, block 0 alone
        assert len(lane.copies) == copies
        run(stream, blocks, lane, [10])
        assert len(lane.copies) == copies + len(stream.streamed)
    replay(lane, Random(0))


def test_blocks_compute_the_same_and_are_at_home_afterwards() -> None:
    blocks = blocks_of(7)
    x = torch.randn(4, 3)

    def forward(stream: BlockStream | None) -> Tensor:
        y = x
        for i, block in enumerate(blocks):
            if stream is None:
                y = y + block(y)
            else:
                with stream.block(i):
                    y = y + block(y)
        return y

    wanted = forward(None)
    for resident in (0, 3, 7):
        stream = BlockStream([[block] for block in blocks], CPU, resident=resident)
        for _ in range(2):
            with stream.open(), stream.open():  # one inside another is one
                assert torch.equal(forward(stream), wanted)
                assert torch.equal(forward(stream), wanted)
            assert torch.equal(forward(None), wanted)  # outside, the weights at home are used
            assert not stream._slots


def test_an_error_in_a_block_leaves_all_as_it_was() -> None:
    blocks = blocks_of(4)
    before = [parameter.clone() for block in blocks for parameter in block.parameters()]
    stream = BlockStream([[block] for block in blocks], CPU)

    def fail_between_hooks() -> None:
        with stream.open():
            stream.acquire(1)  # its counterpart is not called after an error
            raise ValueError("hook")

    with pytest.raises(KeyboardInterrupt), stream.open(), stream.block(2):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="hook"):
        fail_between_hooks()
    homes = {home.untyped_storage().data_ptr() for home in stream.homes}
    for block in blocks:
        for parameter in block.parameters():
            assert parameter.untyped_storage().data_ptr() in homes
    after = [parameter for block in blocks for parameter in block.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_places_are_few_and_resident_blocks_are_spread() -> None:
    blocks = blocks_of(12)
    stream = BlockStream([[block] for block in blocks], CPU, resident=6)
    assert stream.streamed == [1, 3, 5, 7, 9, 11]
    largest = max(home.numel() for home in stream.homes)
    assert stream.slot_bytes == (AHEAD + 1) * largest
    assert BlockStream([[block] for block in blocks], CPU, resident=12).slot_bytes == 0
    for count in range(1, 30):
        for chosen in range(count + 1):
            places = spread(count, chosen)
            assert len(set(places)) == chosen
            assert all(0 <= place < count for place in places)
            gaps = [b - a for a, b in itertools.pairwise(places)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_mixed_dtypes_and_buffers_keep_their_bits() -> None:
    block = nn.Module()
    block.register_parameter("a", nn.Parameter(torch.randn(3, 5).bfloat16()))
    eighths = torch.randn(7, 3).to(torch.float8_e4m3fn)
    block.register_parameter("b", nn.Parameter(eighths, requires_grad=False))
    integers = torch.arange(-128, 127, dtype=torch.int8)
    block.register_parameter("d", nn.Parameter(integers, requires_grad=False))
    block.register_buffer("c", torch.arange(3))
    wanted = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    stream = BlockStream([[block]], CPU)

    def states() -> Iterator[dict[str, Tensor]]:
        yield block.state_dict()
        with stream.open(), stream.block(0):
            yield block.state_dict()

    for state in states():
        for name, tensor in wanted.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8))
