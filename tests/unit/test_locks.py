from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from sparse_exp import locks
from sparse_exp.errors import ConfigError, EngineError
from sparse_exp.locks import (
    default_lock_path,
    exclusive,
    give_way,
    is_held,
    measuring_alone,
    waited_seconds,
    work_paused,
    working,
)

FORK = multiprocessing.get_context("fork")

HOLD = """
import sys, time
from pathlib import Path
from sparse_exp.locks import measuring_alone
with measuring_alone(Path(sys.argv[1])):
    start = time.monotonic()
    print(start, flush=True)
    time.sleep(float(sys.argv[2]))
    print(time.monotonic(), flush=True)
"""


@pytest.fixture(autouse=True)
def lock(tmp_path, monkeypatch) -> Path:
    """The turnstile of a host of one's own, on which nobody waits long for a line in the log."""
    monkeypatch.setattr(locks, "default_lock_path", lambda: tmp_path / "lock")
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_TRIES", 0.02)
    monkeypatch.setattr(locks, "_SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr(locks._process, "warned", False)
    return tmp_path / "lock"


@pytest.fixture
def start():
    """A function that runs another in a process of its own, which is killed after the test at the latest."""
    processes = []

    def begin(function, *arguments):
        process = FORK.Process(target=function, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def keep(lock: Path, held: Path) -> None:
    with exclusive(lock, "X is being done", label="somebody"):
        held.touch()
        time.sleep(60)


def work(steps: Path, *, gives_way: bool = True) -> None:
    """Work in steps of some milliseconds, and write down when each was done."""
    with working(), steps.open("a") as stream:
        while True:
            time.sleep(0.005)
            stream.write(f"{time.monotonic()}\n")
            stream.flush()
            if gives_way:
                give_way()


def times(steps: Path) -> list[float]:
    return [float(line) for line in steps.read_text().splitlines()] if steps.exists() else []


def holder(lock: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(lock), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_never_measure_at_the_same_time(lock):
    processes = [holder(lock, 0.4) for _ in range(3)]
    intervals = sorted(tuple(map(float, process.communicate(timeout=30)[0].split())) for process in processes)
    assert len(intervals) == 3
    for (_, end), (begin, _) in pairwise(intervals):
        assert end <= begin


def test_waiting_names_who_measures_and_a_crashed_one_does_not_block(lock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    process, before = holder(lock, 60), time.strftime("%H:%M:%S")
    process.stdout.readline()  # it measures
    after = time.strftime("%H:%M:%S")
    monkeypatch.setattr(locks.time, "sleep", lambda _: os.kill(process.pid, signal.SIGKILL) or process.wait())
    with measuring_alone(lock):
        assert lock.read_text().startswith(f"process {os.getpid()} since ")
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    (message,) = [record.getMessage() for record in caplog.records]
    told = re.search(
        rf"process {process.pid} since (\S+) \((.*) \.\.\.\); process {os.getpid()} on ", message
    )
    assert told, message
    assert before <= told[1] <= after or after < before  # midnight
    assert told[2].startswith(sys.executable)
    assert "\n" not in message


def test_the_host_is_free_again_after_an_error(lock):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), measuring_alone(lock):
            1 / 0


def test_the_lock_names_its_holder_and_nothing_of_the_one_before(lock):
    lock.write_text("1234567890" * 100)
    with measuring_alone(lock):
        assert re.fullmatch(rf"process {os.getpid()} since \d\d:\d\d:\d\d \(.*\)", lock.read_text())


def test_the_locks_are_for_all_users_whatever_the_umask(lock):
    before = os.umask(0o077)
    try:
        with measuring_alone(lock):
            assert stat.S_IMODE(lock.stat().st_mode) == 0o666
            assert [stat.S_IMODE(path.stat().st_mode) for path in lock.parent.iterdir()] == [0o666] * 2
    finally:
        os.umask(before)


def test_a_lock_that_cannot_be_opened_is_an_error_of_the_benchmark_that_says_what_to_do(tmp_path):
    with pytest.raises(EngineError, match="SPARSE_EXP_LOCKS"), measuring_alone(tmp_path / "missing" / "lock"):
        pass


def test_the_lock_of_the_host_is_in_one_place_wherever_temporary_files_are(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSE_EXP_LOCKS", raising=False)
    here = default_lock_path()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_lock_path() == here
    mine, all_may = tmp_path / "mine", tmp_path / "all"
    mine.mkdir()
    all_may.mkdir()
    all_may.chmod(0o1777)
    monkeypatch.setattr(locks, "_SHARED", (tmp_path / "none", mine, all_may, tmp_path))
    assert default_lock_path().parent == all_may
    monkeypatch.setenv("SPARSE_EXP_LOCKS", str(mine))
    assert default_lock_path().parent == mine


def test_work_goes_on_without_the_lock_after_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "default_lock_path", lambda: tmp_path / "missing" / "lock")
    for _ in range(2):
        with working():
            give_way()
    (warning,) = caplog.records
    assert "does not pause" in warning.getMessage()


def test_work_pauses_while_somebody_measures_and_goes_on_afterwards(lock, tmp_path, start):
    logs = [tmp_path / "steps-0", tmp_path / "steps-1"]
    for steps in logs:
        start(work, steps)
    until(lambda: all(len(times(steps)) > 5 for steps in logs))
    with measuring_alone(lock):
        began = time.monotonic()
        time.sleep(0.3)
        ended = time.monotonic()
    until(lambda: all(times(steps)[-1] > ended for steps in logs))
    for steps in logs:
        assert not [moment for moment in times(steps) if began < moment < ended]


def test_work_that_begins_during_a_measurement_waits_and_the_wait_is_counted_apart(lock, start, tmp_path):
    def measure():
        with measuring_alone(lock):
            (tmp_path / "measuring").touch()
            time.sleep(0.4)

    start(measure)
    until((tmp_path / "measuring").exists)
    before, began = waited_seconds(), time.monotonic()
    with working():
        waited, took = waited_seconds() - before, time.monotonic() - began
    assert 0.1 < waited <= took


def test_who_measures_waits_for_work_that_does_not_look(lock, tmp_path, start, caplog):
    caplog.set_level(logging.INFO)
    steps = tmp_path / "steps"
    process = start(lambda: work(steps, gives_way=False))
    until(lambda: len(times(steps)) > 5)
    killed = []

    def sleep(seconds):  # while this process waits
        killed.append(kill(process)) if not killed else os.sched_yield()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks.time, "sleep", sleep)
        with measuring_alone(lock):
            measured = time.monotonic()
    assert killed  # a crashed one leaves the room
    assert times(steps)[-1] < measured
    assert f"to pause (process {process.pid})." in caplog.text


def test_a_run_may_measure_in_the_midst_of_its_own_work(lock):
    with working(), working(), measuring_alone(lock):
        pass
    with working(), work_paused(), measuring_alone(lock):
        pass


def test_after_its_own_measurement_a_run_is_back_at_work(lock, start, tmp_path):
    with working():
        with measuring_alone(lock):
            pass
        process = holder(lock, 0)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=2.0)
    assert process.communicate(timeout=20)[0]


def test_an_exclusive_lock_is_held_by_one_process(tmp_path, start):
    path = tmp_path / "x"
    process = start(keep, path, tmp_path / "held")
    until((tmp_path / "held").exists)
    assert is_held(path)
    with pytest.raises(ConfigError) as error, exclusive(path, "X is being done", wait=False):
        pass
    assert str(error.value).startswith(f"X is being done by somebody (process {process.pid} on ")
    assert str(error.value).endswith("Wait for it to end.")
    kill(process)
    assert not is_held(path)
    with exclusive(path, "X is being done", wait=False):
        assert is_held(path)
    assert not path.exists()


def test_who_waits_goes_on_when_the_holder_is_killed(tmp_path, start, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    process = start(keep, tmp_path / "x", tmp_path / "held")
    until((tmp_path / "held").exists)
    monkeypatch.setattr(locks.time, "sleep", lambda _: kill(process))
    with exclusive(tmp_path / "x", "X is being done"):
        assert (tmp_path / "x").read_text().startswith(f"process {os.getpid()} on ")
    assert f"X is being done by somebody (process {process.pid}" in caplog.text


def test_a_process_takes_its_own_lock_again(tmp_path):
    path = tmp_path / "x"
    with exclusive(path, "X is being done", wait=False):
        with exclusive(path, "X is being done", wait=False):
            pass
        assert is_held(path)
        assert path.exists()
    assert not is_held(path)


def test_threads_of_a_process_pass_one_after_the_other(tmp_path):
    order = []

    def enter(name: str) -> None:
        with exclusive(tmp_path / "x", "X is being done"), exclusive(tmp_path / "x", "X is being done"):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=enter, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [step.split()[1] for step in order] == ["in", "out"] * 3
    assert all(one.split()[0] == two.split()[0] for one, two in zip(order[::2], order[1::2], strict=True))
    assert not is_held(tmp_path / "x")


def test_without_locks_whoever_left_the_file_may_live(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path / "x", "X is being done"):
        shutil.copy(tmp_path / "x", tmp_path / "y")  # as one elsewhere leaves it
    assert (is_held(tmp_path / "x"), is_held(tmp_path / "y")) == (False, True)


def test_a_lock_may_be_given_back_by_another_thread(tmp_path):
    stack = ExitStack()
    taking = threading.Thread(
        target=stack.enter_context, args=(exclusive(tmp_path / "x", "X is being done"),)
    )
    taking.start()
    taking.join(20)
    assert is_held(tmp_path / "x")
    with pytest.raises(ConfigError), exclusive(tmp_path / "x", "X is being done", wait=False):
        pass
    stack.close()
    with exclusive(tmp_path / "x", "X is being done", wait=False):
        pass


def test_who_waits_gives_up_when_it_took_too_long(tmp_path, start):
    process = start(keep, tmp_path / "x", tmp_path / "held")
    until((tmp_path / "held").exists)
    began = time.monotonic()
    with pytest.raises(ConfigError) as error, exclusive(tmp_path / "x", "X is being done", at_most=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 10
    assert str(error.value).startswith(f"X is being done by somebody (process {process.pid} on ")
    assert "), for more than 0.3 s. Wait for it to end, or" in str(error.value)


def test_a_thread_that_waits_leaves_the_heavy_work_of_another_in_the_room(tmp_path, start):
    """Else a measurement would begin while the other works, and the thread come back when it has ended."""
    process = start(keep, tmp_path / "x", tmp_path / "held")
    until((tmp_path / "held").exists)

    def wait() -> None:
        with exclusive(tmp_path / "x", "X is being done"):
            pass

    waiting = threading.Thread(target=wait)
    with working():
        waiting.start()
        time.sleep(0.1)
        assert locks._process.doors is not None
    kill(process)
    waiting.join(20)
    assert locks._process.doors is None


def test_many_processes_pass_one_after_the_other(tmp_path, start):
    """Each lets go of a file that others wait for: nobody may hold the lock of a file that is gone."""
    count = tmp_path / "count"
    count.write_text("0")

    def add():
        for _ in range(20):
            with exclusive(tmp_path / "x", "X is being done"):
                seen = int(count.read_text())
                time.sleep(0.001)
                count.write_text(str(seen + 1))

    processes = [start(add) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert count.read_text() == "80"


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path, start):
    def parent():
        with exclusive(tmp_path / "x", "X is being done"):
            if os.fork() == 0:
                (tmp_path / "child").write_text(str(os.getpid()))
                time.sleep(60)
            time.sleep(60)

    process = start(parent)
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    kill(process)
    try:
        with exclusive(tmp_path / "x", "X is being done", wait=False):
            pass
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_child_that_was_forked_while_its_parent_measured_does_not_keep_the_host(lock, start):
    def measure():
        with measuring_alone(lock):
            pass

    with measuring_alone(lock):
        start(time.sleep, 60)
    following = start(measure)
    following.join(20)
    assert following.exitcode == 0


def test_nobody_who_waits_for_another_keeps_a_measurement_waiting(lock, tmp_path, start):
    """A works and holds what B wants, who works too; were B still in the room, A would pause for a
    measurement that waits for B, who waits for A."""

    def a():
        with exclusive(tmp_path / "x", "X is being done"):
            work(tmp_path / "a")

    def b():
        with working():
            (tmp_path / "b").touch()
            with exclusive(tmp_path / "x", "X is being done"):
                pass

    first = start(a)
    until((tmp_path / "a").exists)
    second = start(b)
    until((tmp_path / "b").exists)
    time.sleep(0.1)
    measurement = holder(lock, 0)
    assert measurement.communicate(timeout=20)[0]
    assert second.is_alive()
    kill(first)
    second.join(20)
    assert second.exitcode == 0


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_it_is_said_once_and_the_work_goes_on(
    tmp_path, monkeypatch, caplog, refusal
):
    """NFSv3 without lockd, Lustre without -o flock; there is none of them here."""

    def refuse(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    for _ in range(2):
        with exclusive(tmp_path / "a.lock", "It is being written"):
            assert is_held(tmp_path / "a.lock")
    assert not (tmp_path / "a.lock").exists()
    said = [record.message for record in caplog.records if "cannot be locked here" in record.message]
    assert said == [f"Files cannot be locked here ({os.strerror(refusal)}): do not start the same run twice."]
