"""Commands that messages tell people to type: a shell reads them as they are printed, and they help."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command import Ended

from sparse_exp.config.schema import STAGES

WORDS = [
    "experiment=smoke", "tracker=none", "seed=7", "dataset.imgsz=64", "recipe.variables.num_epochs=1",
    "hardware.engines=[onnxruntime]", "hardware.variants=[sparse]",
]  # fmt: skip
UP_TO_EXPORT = STAGES[: STAGES.index("export") + 1]
NAME = "a run=1, [it's]"  # characters that mean something to a shell or to Hydra
QUOTED = f'"{NAME}"'


pytestmark = pytest.mark.slow  # they share a real run


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def call(cache, tmp_path, monkeypatch, capsys):
    """Calls a module as ``python -m MODULE WORDS``, but in this process, and says how it ended."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(cache))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("SPARSE_EXP_ZOO", raising=False)

    def call(module: str, *words: str) -> Ended:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [module, *words])
        code, error = 0, ""
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as end:
            code, error = (end.code or 0, "") if isinstance(end.code, int | None) else (1, str(end.code))
        shown = capsys.readouterr()
        return Ended(code, error, shown.out + shown.err)

    return call


@pytest.fixture
def type_in(call, tmp_path):
    """Types a command into a shell. What it starts is called in this process, which has imported torch."""
    python = executable(tmp_path / "bin" / "python", "printf '%s\\0' \"$@\"")

    def type_in(line: str) -> Ended:
        path = f"{python.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, check=True
        )
        option, module, *words = done.stdout.decode().split("\0")[:-1]
        assert option == "-m"
        return call(module, *words)

    return type_in


def executable(path: Path, line: str) -> Path:
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def hint(text: str) -> str:
    """The command at the end of a line."""
    (found,) = re.findall(r"python -m sparse_exp.*$", text, re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory) -> Path:
    """A run that has trained and exported; do not change it."""
    place = tmp_path_factory.mktemp("made")
    words = [*WORDS, f"stages=[{','.join(UP_TO_EXPORT)}]", f"paths.run={QUOTED}"]
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(cache)}
    subprocess.run([sys.executable, "-m", "sparse_exp", *words], cwd=place, env=environment, check=True)
    return place / NAME


@pytest.fixture
def run(made, call) -> Path:
    """A copy of it, where it was made from."""
    shutil.copytree(made, NAME)
    return Path(NAME).absolute()


def change(run: Path, **state) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, **state}))


def forget(run: Path, *stages: str) -> None:
    """As if the run had been asked for the other stages only."""
    manifest = json.loads((run / "manifest.json").read_text())
    kept = {name: record for name, record in manifest["stages"].items() if name not in stages}
    change(run, stages=kept)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "stages": list(kept)}))
    if "export" in stages:
        shutil.rmtree(run / "deployment")


def state(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def publish(call, run: Path) -> Ended:
    return call("sparse_exp.zoo", "publish", str(run), "--zoo", "zoo")


def good(ended: Ended) -> str:
    """What a command printed, which ended well."""
    assert ended.code == 0, ended.output + ended.error
    return ended.output


def test_a_run_directory_that_exists(call, type_in, run):
    ended = call("sparse_exp", *WORDS, f"paths.run={QUOTED}")
    before, config = state(run), (run / "config.yaml").read_bytes()
    good(type_in(hint(ended.error)))
    after = state(run)
    assert [after[key] for key in ("stages", "overrides")] == [before[key] for key in ("stages", "overrides")]
    assert (run / "config.yaml").read_bytes() == config


def test_a_full_disk(call, type_in, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = [*WORDS, "stages=[fetch,plan,train]", f"paths.run={QUOTED}"]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        ended = call("sparse_exp", *words)
    assert "The disk is full (stage train)." in ended.error
    run = Path(NAME)
    config = (run / "config.yaml").read_bytes()
    good(type_in(hint(ended.error)))
    assert (run / "config.yaml").read_bytes() == config
    assert (state(run)["status"], list(state(run)["stages"])) == ("FINISHED", ["fetch", "plan", "train"])


def test_publishing_a_run_that_was_killed(call, type_in, run):
    forget(run, "export")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "stages": list(UP_TO_EXPORT)}))
    change(run, status="KILLED", stage="export")
    ended = publish(call, run)
    assert "to be FINISHED, but got 'KILLED'" in ended.error
    good(type_in(hint(ended.error)))
    assert "Published zoo:" in good(publish(call, run))


@pytest.mark.parametrize("missing", [["evaluate", "export"], ["train", "evaluate", "export"]])
def test_publishing_a_run_without_some_stages(call, type_in, run, missing):
    forget(run, *missing)
    ended = publish(call, run)
    assert "Expected" in ended.error
    good(type_in(hint(ended.error)))
    assert "Published zoo:" in good(publish(call, run))
    assert yaml.safe_load((run / "config.yaml").read_text())["stages"] == list(UP_TO_EXPORT)


def test_publishing_a_run_that_was_changed(call, type_in, run):
    with (run / "deployment" / "model.onnx").open("ab") as file:
        file.write(b" ")
    ended = publish(call, run)
    assert "not what the run wrote" in ended.error
    good(type_in(hint(ended.error)))
    assert "Published zoo:" in good(publish(call, run))


def test_predicting_with_a_run_that_has_exported_nothing(call, type_in, run, photo):
    forget(run, "evaluate", "export")
    words = [str(run), str(photo), "--engine", "onnxruntime", "--out", "found"]
    ended = call("sparse_exp.predict", *words)
    assert "has no exported model" in ended.error
    good(type_in(hint(ended.error)))
    good(call("sparse_exp.predict", *words))


@pytest.fixture
def photo(tmp_path) -> Path:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("known", [True, False])
def test_the_best_run_is_made_again(call, type_in, run, known):
    """By the words of its command line, or where these are not known by its record."""
    if not known:
        manifest = state(run)
        del manifest["overrides"]
        (run / "manifest.json").write_text(json.dumps(manifest))
    ended = call("sparse_exp.compare", str(run), "--x", "size", "--best", "map50>=0")
    line = hint(good(ended))
    assert line.startswith(f"python -m {'sparse_exp experiment=smoke' if known else 'sparse_exp.rerun'} ")
    good(type_in(line))
    (again,) = Path("outputs/runs").glob("*/*")
    made, new = (yaml.safe_load((place / "config.yaml").read_text()) for place in (run, again))
    if not known:  # what the data chose then is taken again
        made["trainer"]["batch_size"] = state(run)["settled"]["batch_size"]
    assert {**new, "paths": None} == {**made, "paths": None}
    assert state(again)["status"] == "FINISHED"
    assert state(again).get("overrides") == (state(run)["overrides"][:-1] if known else None)


def test_what_a_killed_run_is_finished_with(cache, tmp_path):
    """In processes of their own: a preset's run is killed while it trains, and finished by its name alone."""
    python = executable(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"')
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(cache), "SPARSE_EXP_ZOO": str(tmp_path / "zoo")}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    words = [*WORDS, "recipe.variables.num_epochs=4", f"stages=[{','.join(UP_TO_EXPORT)}]"]
    run, log = tmp_path / NAME, tmp_path / NAME / "sparse_exp.log"
    command = [sys.executable, "-m", "sparse_exp", *words, f"paths.run={QUOTED}"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        deadline = time.monotonic() + 300
        while not (log.is_file() and "epoch 2 " in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    before = (run / "config.yaml").read_bytes()
    refused = shell(f'python -m sparse_exp.zoo publish "{NAME}"')
    finished = shell(hint(refused.stderr))
    assert finished.returncode == 0, finished.stderr
    assert "Going on with the training after epoch" in finished.stderr
    assert (run / "config.yaml").read_bytes() == before
    published = shell(f'python -m sparse_exp.zoo publish "{NAME}"')
    assert published.returncode == 0, published.stderr
