"""The simulation of a run over millions of pictures keeps the books straight."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arm_hf.manifest import Part
from arm_hf.scaling import Fleet, shares, simulate, storage, table

FLEET = Fleet(images=100_000, machines=4, processes=2, rate=10.0, images_per_shard=1_000)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 12))
def test_shares_are_those_of_the_command(images, images_per_shard, count):
    found = shares(images, images_per_shard, count)
    assert sum(map(sum, found)) == images
    shards = -(-images // images_per_shard)
    if shards >= count:
        assert [len(part) for part in found] == [len(range(shards)[Part(index, count).share]) for index in range(count)]
    else:
        assert max(map(sum, found)) - min(map(sum, found)) <= shards


def test_without_failures_only_the_start_and_the_last_shard_cost():
    found = simulate(replace(FLEET, hours_between_failures=1e9))
    assert (found.failures, found.repeated, found.restart_hours) == (0, 0, 0)
    longest = 13 * 1_000 / 10.0 + FLEET.start_seconds  # 100 shards over 8 processes: one of 13
    assert found.hours == pytest.approx(longest / 3600)
    assert found.ideal_hours == pytest.approx(100_000 / 80 / 3600)


def test_failures_cost_what_was_in_flight_and_the_restart():
    found = simulate(replace(FLEET, hours_between_failures=0.2), seed=1)
    assert found.failures > 0
    assert 0 < found.repeated <= found.failures * FLEET.processes * FLEET.in_flight
    restart = found.failures * FLEET.processes * (FLEET.start_seconds + 200)
    assert 0 < found.restart_hours * 3600 < restart
    assert found.hours > simulate(replace(FLEET, hours_between_failures=1e9)).hours
    assert simulate(replace(FLEET, hours_between_failures=0.2), seed=1) == found


def test_more_machines_are_faster_and_few_large_shards_leave_some_idle():
    hours = [simulate(replace(FLEET, machines=count, hours_between_failures=1e9)).hours for count in (1, 2, 4)]
    assert hours == sorted(hours, reverse=True)
    coarse = simulate(replace(FLEET, images_per_shard=11_000, hours_between_failures=1e9))
    fine = simulate(replace(FLEET, images_per_shard=500, hours_between_failures=1e9))
    assert coarse.idle_hours > fine.idle_hours and coarse.overhead > fine.overhead


def test_tables_and_nonsense():
    assert len(table([FLEET, FLEET]).splitlines()) == 4
    assert f"| {2 * FLEET.images:,} |" in storage(FLEET)
    with pytest.raises(ValueError, match="rate must be positive"):
        Fleet(rate=0)


def test_fewer_files_than_processes_make_reading_the_limit():
    few = replace(FLEET, images_per_shard=20_000, rate=1e4, hours_between_failures=1e9)
    assert simulate(few).hours == pytest.approx((100_000 * few.image_bytes / few.read_rate + few.start_seconds) / 3600)
