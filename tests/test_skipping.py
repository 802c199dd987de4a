from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krea_local.sampling import flow_sigmas
from krea_local.skipping import Skipping, StepCache


def run(cache: StepCache, firsts: list[float], rest: object) -> list[float]:
    """Walk the steps as the transformer does; what each step would add after its first block."""
    added = []
    for step, first in enumerate(firsts):
        spared = cache.skip(step, torch.full((2, 3), first))
        if spared is None:
            spared = torch.full((2, 3), rest(cache.levels[step]))
            cache.keep(step, spared)
        added.append(float(spared[0, 0]))
    return added


def test_steps_are_skipped_where_the_first_block_changes_little() -> None:
    skipping = Skipping(threshold=0.1, first_full=2, last_full=1, in_a_row=9)
    cache = StepCache(skipping, torch.linspace(1, 0, 9))
    #        full full 5 %   9 %   20 %  full  1 % last
    firsts = [1.0, 1.0, 1.05, 1.09, 1.20, 1.21, 1.2, 1.2]
    run(cache, firsts, lambda level: level)
    # Changes count from the last full step: 1.09 from 1.0, 1.21 from 1.20.
    assert cache.skipped == [2, 3, 5, 6]


@given(st.integers(1, 50), st.floats(0.05, 1), st.integers(0, 6), st.integers(0, 4))
def test_a_pattern_computes_its_share_and_never_skips_the_ends(
    steps: int, computed: float, first_full: int, last_full: int
) -> None:
    skipping = Skipping(computed=computed, first_full=first_full, last_full=last_full)
    pattern = skipping.pattern(steps)
    assert len(pattern) == steps
    assert not any(pattern[:first_full])
    assert last_full == 0 or not any(pattern[-last_full:])
    ends = min(steps, first_full + last_full)
    full = pattern.count(False)
    assert full >= ends
    if computed * steps >= ends:
        assert full == min(steps, -int(-computed * steps // 1))


def test_half_of_28_steps_are_spread_evenly() -> None:
    pattern = Skipping(computed=0.5).pattern(28)
    assert pattern.count(False) == 14
    drawn = "".join(".#"[not skipped] for skipped in pattern)
    assert "...." not in drawn  # at most three in a row
    assert drawn.startswith("####")
    assert drawn.endswith("##")


def test_what_is_spared_is_extrapolated_along_the_noise_level() -> None:
    sigmas = flow_sigmas(12, 4096)  # unevenly spaced
    skipping = Skipping(threshold=0.5, first_full=2, last_full=1)
    cache = StepCache(skipping, sigmas)
    added = run(cache, [1.0] * 12, lambda level: 3 - 2 * level)
    assert cache.skipped == [2, 3, 4, 6, 7, 8, 10]  # at most three in a row
    assert added == pytest.approx([3 - 2 * level for level in sigmas.tolist()[:-1]], abs=1e-5)


def test_with_one_step_behind_it_its_own_result_is_taken_again() -> None:
    skipping = Skipping(threshold=0.5, first_full=1, last_full=0, in_a_row=1)
    cache = StepCache(skipping, torch.linspace(1, 0, 3))
    assert run(cache, [1.0, 1.0], lambda level: level) == [1.0, 1.0]


def test_an_image_to_image_call_of_few_steps_skips_none() -> None:
    cache = StepCache(Skipping(threshold=9.0), torch.linspace(0.3, 0, 7))
    run(cache, [1.0] * 6, lambda level: level)
    assert cache.skipped == []


def test_a_change_that_is_not_a_number_skips_nothing() -> None:
    cache = StepCache(Skipping(first_full=1, last_full=0), torch.linspace(1, 0, 5))
    run(cache, [float("nan")] * 4, lambda level: level)
    assert cache.skipped == []
