import json
from types import SimpleNamespace

import pytest

from sparse_exp.benchmark import host_state
from sparse_exp.benchmark.host_state import Steal, free_memory_share, look_around
from sparse_exp.hardware import cgroups

GIGABYTE = 1 << 30


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A system that tells what the test says."""
    fake = SimpleNamespace(
        cpu_percent=lambda percpu: [100.0, 50.0, 9.0],
        cpu_freq=lambda percpu: [SimpleNamespace(current=mhz) for mhz in (2000.0, 3000.0, 9000.0)],
        cpu_times=lambda: SimpleNamespace(user=0.0),
        virtual_memory=lambda: SimpleNamespace(available=6 * GIGABYTE, total=8 * GIGABYTE),
    )
    monkeypatch.setattr(host_state, "psutil", fake)
    monkeypatch.setattr(host_state, "_WINDOW_S", 0.0)
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(host_state.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(host_state.os, "getloadavg", lambda: (1.234, 0.0, 0.0))
    ticks = iter([(0.0, 0.0), (6.0, 2.0)])
    times = __import__("collections").namedtuple("times", ["user", "steal"])
    fake.cpu_times = lambda: times(*next(ticks))
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


def test_the_real_host_can_be_looked_at():
    found = look_around()
    assert found.busy_cores >= 0
    assert 0 <= found.steal <= 1
    assert 0 < free_memory_share() <= 1
