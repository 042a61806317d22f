"""Child processes: what they print, and how their end is told."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import psutil

from sparse_exp.children import how_it_ended, start_process


def test_every_line_is_told_and_the_last_is_kept():
    told: list[str] = []
    code = "import os, sys; os.write(2, b'one\\n\\n  two\\n'); os.write(1, b'th\\xffree'); sys.exit(3)"
    process, (pipe,), output = start_process([sys.executable, "-c", code], told=told.append)
    assert how_it_ended(process.wait(), output) == "exit code 3, it said: th\ufffdree"
    assert told == ["one", "two", "th\ufffdree"]
    pipe.close()


def test_however_much_a_process_prints_little_of_it_is_kept():
    code = "import os\nfor _ in range(64): os.write(1, bytes(2**20))\nprint('\\nlast')"
    tracemalloc.start()
    process, (pipe,), output = start_process([sys.executable, "-c", code])
    assert how_it_ended(process.wait(), output) == "exit code 0, it said: last"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    pipe.close()


def test_whoever_is_told_may_fail():
    process, (pipe,), output = start_process(
        [sys.executable, "-c", "print(1); print(2)"], told=lambda _: 1 / 0
    )
    assert how_it_ended(process.wait(), output) == "exit code 0, it said: 2"
    pipe.close()


def test_the_output_of_a_child_that_its_own_child_goes_on_holding_is_not_waited_for():
    code = "import subprocess, sys; subprocess.Popen(['sleep', '5']); print('left')"
    process, (pipe,), output = start_process([sys.executable, "-c", code])
    assert how_it_ended(process.wait(), output) == "exit code 0, it said: left"
    pipe.close()


def test_processes_of_a_pool_end_when_whoever_made_it_was_killed():
    code = """
import joblib, os, time
from sparse_exp.children import end_when_orphaned

def task():
    end_when_orphaned()
    print(os.getpid(), flush=True)
    time.sleep(60)

joblib.Parallel(n_jobs=2)(joblib.delayed(task)() for _ in range(2))
"""
    pool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    members = [psutil.Process(int(pool.stdout.readline())) for _ in range(2)]
    pool.kill()
    gone, left = psutil.wait_procs(members, timeout=20)
    assert (len(gone), left) == (2, [])
    pool.wait()
