import json
from collections import namedtuple
from types import SimpleNamespace

import pytest

from sparse_exp.benchmark import host_state
from sparse_exp.benchmark.host_state import Steal, Throttling, free_memory_share, look_around
from sparse_exp.hardware import cgroups

GIGABYTE = 1 << 30


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system that tells what the test says."""
    fake = SimpleNamespace(
        cpu_percent=lambda percpu: [100.0, 50.0, 9.0],
        cpu_freq=lambda percpu: [SimpleNamespace(current=mhz) for mhz in (2000.0, 3000.0, 9000.0)],
        virtual_memory=lambda: SimpleNamespace(available=6 * GIGABYTE, total=8 * GIGABYTE),
    )
    monkeypatch.setattr(host_state, "psutil", fake)
    monkeypatch.setattr(host_state, "_WINDOW_S", 0.0)
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(host_state.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(host_state.os, "getloadavg", lambda: (1.234, 0.0, 0.0))
    ticks = iter([(0.0, 0.0), (6.0, 2.0)])
    times = namedtuple("times", ["user", "steal"])

    def cpu_times(percpu):
        user, steal = next(ticks)
        return [times(user / 2, steal / 2)] * 2 + [times(0.0, 99 * user)]  # the last is not this process's

    fake.cpu_times = cpu_times
    return fake


def test_only_cores_that_may_be_used_count(system):
    found = look_around()
    assert found.busy_cores == 1.5
    assert found.frequency_mhz == 2500
    assert found.load_average == 1.23
    assert json.loads(json.dumps(found.as_dict()))["steal"] == pytest.approx(0.25)


def test_steal_is_the_share_of_the_time_since(system):
    assert Steal().share() == pytest.approx(2 / 8)


@pytest.mark.parametrize("clocks", [[], [SimpleNamespace(current=0.0)] * 3, None])
def test_a_clock_that_is_not_told_is_none(system, clocks):
    system.cpu_freq = lambda percpu: clocks
    assert look_around().frequency_mhz is None


def test_free_memory_is_that_of_the_container_where_it_has_a_limit(system, tmp_path):
    assert free_memory_share() == pytest.approx(6 / 8)
    (tmp_path / "memory.max").write_text(f"{4 * GIGABYTE}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIGABYTE}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file {GIGABYTE}\n")  # what can be dropped is free
    assert free_memory_share() == pytest.approx(2 / 4)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_share() == pytest.approx(6 / 8)


def test_free_memory_is_that_of_the_fullest_group_around_the_process(system, tmp_path):
    inner = tmp_path / "memory" / "pod" / "box"
    inner.mkdir(parents=True)
    for group, limit, used in ((inner.parent, 5, 4), (inner, 4, 2)):
        (group / "memory.limit_in_bytes").write_text(f"{limit * GIGABYTE}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used * GIGABYTE}\n")
    (tmp_path / "own").write_text("9:memory:/pod/box\n4:cpu,cpuacct:/pod\n")
    assert free_memory_share() == pytest.approx(1 / 5)
    (inner.parent / "memory.stat").write_text(f"total_inactive_file {2 * GIGABYTE}\n")
    assert free_memory_share() == pytest.approx(2 / 4)
    (inner / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # what version 1 has for none
    assert free_memory_share() == pytest.approx(3 / 5)


def test_cpus_that_others_use_least_are_free(system):
    system.cpu_percent = lambda window, percpu: [90.0, 3.0, 0.0, 41.0]
    assert host_state.free_cpus([0, 1, 2, 3], 2) == [1, 2]
    assert host_state.free_cpus([0, 1, 3], 2) == [1, 3]
    assert host_state.free_cpus([0, 1], 5) == [0, 1]
    system.cpu_percent = lambda window, percpu: [1.0, 3.0, 0.0, 4.0]
    assert host_state.free_cpus([0, 1, 2, 3], 2) == [0, 1]  # where all are as free, the first


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("pod/cpu.stat", "nr_throttled 1\nthrottled_usec 1000000", "nr_throttled 9\nthrottled_usec 1500000"),
        ("cpu/pod/cpu.stat", "throttled_time 1000000000", "throttled_time 1500000000"),
    ],
)
def test_throttling_is_that_of_the_groups_around_the_process(
    file, before, after, system, tmp_path, monkeypatch
):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(host_state.time, "monotonic", lambda: next(clock))
    (tmp_path / "own").write_text("0::/pod\n4:cpu:/pod\n")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(before)
    throttling = Throttling()
    (tmp_path / file).write_text(after)
    assert throttling.share() == pytest.approx(0.25)


def test_the_real_host_can_be_looked_at():
    found = look_around()
    assert found.busy_cores >= 0
    assert 0 <= found.steal <= 1
    assert 0 < free_memory_share() <= 1
