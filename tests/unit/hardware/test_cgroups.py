"""Files as the kernel's documents of cgroups show them, versions 1 and 2."""

from __future__ import annotations

import pytest

from sparse_exp.hardware import cgroups
from sparse_exp.hardware.cgroups import MemoryLimit, cpu_quota, memory_limits


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Writes the process's groups and their files, as they lie below /sys/fs/cgroup."""

    def pretend(own, files):
        if own is not None:
            (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(cgroups, "_GROUPS", tmp_path / "sys")
        monkeypatch.setattr(cgroups, "_OWN_GROUP", tmp_path / "own")

    return pretend


def memory_v2(folder, most, used, stat=""):
    return {f"{folder}memory.max": most, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def memory_v1(folder, most, used, stat=""):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{folder}{name}": text for name, text in zip(names, (most, used, stat), strict=True)}


@pytest.mark.parametrize(
    ("own", "files", "limits"),
    [
        ("0::/\n", memory_v2("", 3000, 1000, "anon 5\nfile 900\nactive_file 10\ninactive_file 20"),
         [MemoryLimit(3000, 1000, 30)]),
        ("0::/\n", memory_v2("", "max", 1000), []),
        ("0::/a/b\n", {**memory_v2("a/b/", "max", 1000), **memory_v2("a/", 3000, 2000)},
         [MemoryLimit(3000, 2000, 0)]),
        ("9:memory:/\n", memory_v1("", 3000, 1000, "cache 7\ntotal_active_file 10\ntotal_inactive_file 20"),
         [MemoryLimit(3000, 1000, 30)]),
        ("9:memory:/a/b\n3:cpuset:/c\n",
         {**memory_v1("a/b/", 3000, 1000), **memory_v1("a/", 9000, 2000), **memory_v1("c/", 1, 1)},
         [MemoryLimit(3000, 1000, 0), MemoryLimit(9000, 2000, 0)]),
        (None, memory_v2("", 3000, 1000), [MemoryLimit(3000, 1000, 0)]),  # not Linux's usual /proc
        ("0::/\n", {}, []),
    ],
    ids=["v2", "v2 without", "v2 of a group around", "v1", "v1 nested", "only the root", "none"],
)  # fmt: skip
def test_limits_of_memory(system, own, files, limits):
    system(own, files)
    found = {(limit.most, limit.used, limit.cached) for limit in memory_limits()}
    assert found == {(limit.most, limit.used, limit.cached) for limit in limits}


@pytest.mark.parametrize(("limit", "left"), [((3000, 1000, 200), 2200), ((3000, 3500, 100), 0)])
def test_a_cache_of_files_counts_as_left(limit, left):
    assert MemoryLimit(*limit).left == left


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/\n", {"cpu.max": "100000 100000"}, 1.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": ""}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
                                "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_cpu_time(system, own, files, cores):
    system(own, files)
    assert cpu_quota() == cores


def test_a_process_outside_the_visible_groups_is_no_error(system):
    system("0::/../../other\n", {"cpu.max": "200000 100000", **memory_v2("", 3000, 1000)})
    assert cpu_quota() == 2.0
    assert memory_limits() == [MemoryLimit(3000, 1000, 0)]


def test_the_limits_of_this_host_can_be_read():
    quota = cpu_quota()
    assert quota is None or quota > 0
    assert all(limit.left >= 0 for limit in memory_limits())
