"""Sweeps on Slurm, of which four small programs stand in: they queue, run, tell states and cancel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="the extra slurm is not installed")

PATIENCE_S = 240
SBATCH = """
import itertools, os, pathlib, re, subprocess, sys
script, place = sys.argv[-1], pathlib.Path(os.environ["FAKE_SLURM"])
text = pathlib.Path(script).read_text()
number = next(n for n in itertools.count(100) if not (place / str(n)).exists())
(place / str(number)).mkdir()
array = re.search(r"#SBATCH --array=0-(\\d+)", text)
for task in range(int(array[1]) + 1 if array else 1):
    own = {"SLURM_JOB_ID": str(number + 1000 + task), "SLURM_ARRAY_JOB_ID": str(number)}
    own |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    own |= {"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(["bash", script], env={**os.environ, **own}, start_new_session=True, **quiet)
    (place / str(number) / str(job.pid)).touch()
print("Submitted batch job", number)
"""
SRUN = """
import os, sys
words = sys.argv[1:]
command = words[words.index("-u") - 1:]
out = words[words.index("--output") + 1]
for sign, name in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID"), ("%j", "SLURM_JOB_ID")):
    out = out.replace(sign, os.environ[name])
os.makedirs(os.path.dirname(out), exist_ok=True)
file = os.open(out.replace("%t", "0"), os.O_WRONLY | os.O_CREAT)
os.dup2(file, 1)
os.dup2(file, 2)
os.execvp(command[0], command)
"""
SACCT = "print('JobID|State|NodeList')"
SCANCEL = """
import os, pathlib, signal, sys
place = pathlib.Path(os.environ["FAKE_SLURM"])
with (place / "cancelled").open("a") as log:
    print(*sys.argv[1:], file=log)
for job in sys.argv[1:]:
    for task in (place / job).iterdir():
        try:
            os.killpg(int(task.name), signal.SIGTERM)
        except ProcessLookupError:
            pass
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """The folder of the cluster's own files; its programs are on the PATH."""
    place, programs = tmp_path / "cluster", tmp_path / "bin"
    for folder in (place, programs):
        folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SCANCEL)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(place))
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield place
    for task in place.glob("1*/*"):
        try:
            os.killpg(int(task.name), signal.SIGKILL)
        except ProcessLookupError:
            continue


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparse_exp", "-m", "experiment=smoke", "launcher=slurm", "seed=0,1"]
    command += ["sweep.name=s", "tracker.system_metrics=false", "hydra.launcher.mem_gb=null", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=place, start_new_session=True, **pipes)


def said(process: subprocess.Popen[str], code: int) -> str:
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == code, text
    return text


def manifests(place: Path) -> list[dict]:
    found = sorted(place.glob("outputs/sweeps/s/*/manifest.json"))
    return [json.loads(path.read_text()) for path in found]


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_jobs_are_submitted_cancelled_and_gone_on_with(slurm, tmp_path):
    words = ("stages=[fetch,plan,train]", "dataset.imgsz=64", "recipe.variables.num_epochs=12")
    jobs = tmp_path / "outputs" / "sweeps" / "s"
    process = start(tmp_path, *words)
    wait_until(lambda: list(jobs.glob("*/weights/state.pt")))  # one of them trains
    os.killpg(process.pid, signal.SIGINT)
    text = said(process, 130)
    assert "Cancelling the Slurm jobs 100." in text
    assert (slurm / "cancelled").read_text() == "100\n"
    wait_until(lambda: not {each["status"] for each in manifests(tmp_path)} & {"RUNNING"})
    assert "interrupted" in [each["failure"] for each in manifests(tmp_path)]

    process = start(tmp_path, *words)
    going_on = "Going on with the training after epoch"
    wait_until(lambda: any(going_on in log.read_text() for log in jobs.glob("*/sparse_exp.log")))
    process.kill()  # the launcher alone: its jobs go on
    process.communicate(timeout=PATIENCE_S)
    text = said(start(tmp_path, *words), 0)  # which waits for them
    assert "2 of 2 jobs finished" in text
    assert [each["status"] for each in manifests(tmp_path)] == ["FINISHED"] * 2
    for job in jobs.glob("*/history.json"):
        epochs = [row["epoch"] for row in json.loads(job.read_text())]
        assert epochs == sorted(set(epochs))
        assert epochs[-1] == 12
    assert (slurm / "cancelled").read_text() == "100\n"
