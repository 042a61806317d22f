"""A run whose process is killed in the middle of its training, and gone on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from available import needs_sparseml

from sparse_exp.yolov5 import read_checkpoint

WORDS = [
    "experiment=smoke",
    "tracker=none",
    "stages=[fetch,plan,train]",
    "dataset.workers=1",
    "recipe.variables.num_epochs=5",
]
IN_QAT = "recipe.variables.quantization_epochs=2.5"  # fmt: skip


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(place / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "sparse_exp", *WORDS, *words], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    with process:
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def kill_after(process: subprocess.Popen[str], epoch: str, log: Path) -> None:
    with process:
        try:
            deadline = time.monotonic() + 300
            while not (log.is_file() and f"epoch {epoch} " in log.read_text()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_sigkill_while_channels_go(tmp_path):
    words = ["recipe=slim_quant", "recipe.variables.quantization_epochs=1", "recipe.variables.dense_epochs=1",
             "recipe.variables.slimming_epochs=2"]  # fmt: skip
    finish(start(tmp_path, *words, "paths.run=whole"))
    kill_after(start(tmp_path, *words, "paths.run=cut"), "2", tmp_path / "cut" / "sparse_exp.log")
    output = finish(start(tmp_path, "resume=cut"))
    assert "Going on with the training after epoch" in output
    for name in ("best_dense.pt", "best_slim.pt", "best_slim_quant.pt", "last.pt"):
        one, two = (read_checkpoint(tmp_path / run / "weights" / name) for run in ("whole", "cut"))
        assert one.widths == two.widths
        assert [k for k, v in one.state_dict.items() if not torch.equal(v, two.state_dict[k])] == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", pytest.param("sparseml", marks=needs_sparseml)])
def test_sigkill_costs_at_most_the_epoch_in_progress(tmp_path, engine):
    finish(start(tmp_path, IN_QAT, f"recipe.engine={engine}", "paths.run=whole"))
    cut = start(tmp_path, IN_QAT, f"recipe.engine={engine}", "paths.run=cut")
    kill_after(cut, "2", tmp_path / "cut" / "sparse_exp.log")
    kill_after(start(tmp_path, "resume=cut"), "4", tmp_path / "cut" / "sparse_exp.log")
    output = finish(start(tmp_path, "resume=cut"))
    assert re.search(r"Going on with the training after epoch [34] of 5", output)  # within QAT
    assert not list((tmp_path / "cut" / "weights").glob("*state*"))
    whole, cut = (
        [
            {
                name: value
                for name, value in record.items()
                if name not in ("seconds", "images_per_s", "ended")
            }
            for record in json.loads((tmp_path / run / "history.json").read_text())
        ]
        for run in ("whole", "cut")
    )
    assert cut == whole
    for name in ("best_pruned.pt", "best_pruned_quant.pt", "last.pt"):
        one, two = (read_checkpoint(tmp_path / run / "weights" / name).state_dict for run in ("whole", "cut"))
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
