"""Sweeps from the command line: what is kept, refused, marked and made anew. Only data sets are fetched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import command_line
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from sparse_exp import cli
from sparse_exp.files import write_json, write_text
from sparse_exp.sweep.job import Job, _label

__all__ = ["command_line"]

TINY = ["-m", "model=yolov5n", "dataset=digits", "model.weights=scratch", "tracker=none", "stages=[fetch]"]
TWO = [*TINY, "sweep.name=two", "trainer.lr=0.001,0.002"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sx(tmp_path, cache, monkeypatch, command_line):
    """Calls the command line in this process and in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(cache))
    return command_line


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> Path:
    """What the sweep `TWO` leaves; do not change it."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("SPARSE_EXP_CACHE", str(cache))
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", ["sparse-exp", *TWO])
        cli.main()
    return place / "outputs"


@pytest.fixture
def two(sx, finished, tmp_path):
    """The command line, in a directory where the sweep `TWO` has finished."""
    shutil.copytree(finished, tmp_path / "outputs")
    return sx


def manifest(job: str) -> dict:
    return json.loads(
        Path(f"outputs/sweeps/two/{job}-yolov5n-digits-transfer_quant/manifest.json").read_text()
    )


def fingerprints(job: str) -> tuple:
    record = manifest(job)["stages"]["fetch"]
    return record["fingerprint"], record["seconds"]


def test_the_same_command_keeps_finished_jobs_and_their_numbers(two):
    first = [fingerprints("0"), fingerprints("1")]
    assert manifest("1")["overrides"][-1] == "trainer.lr=0.002"
    again = two(*TWO)
    assert again.code == 0
    assert again.output.count(": kept.") == 2
    assert [fingerprints("0"), fingerprints("1")] == first


def test_a_failed_job_is_marked_and_the_others_go_on(sx):
    ended = sx(*TINY, "sweep.name=two", "trainer.lr=0.001,5,0.002")
    assert ended.code == 1
    assert ended.error == "Error: 2 of 3 jobs finished, see above. The same command goes on with the others."
    assert [manifest(job)["status"] for job in "012"] == ["FINISHED", "FAILED", "FINISHED"]
    assert "trainer.lr to be above 0.0 and at most 1.0, but got 5.0" in manifest("1")["failure"]
    assert "1-yolov5n-digits-transfer_quant FAILED: Expected trainer.lr" in ended.output
    assert "Traceback" not in ended.output


def test_what_failed_is_gone_on_with_once_it_is_mended(sx):
    assert sx(*TINY, "sweep.name=two", "trainer.lr=0.001,5").code == 1
    assert sx(*TWO).code == 0
    assert manifest("1")["status"] == "FINISHED"
    assert manifest("1")["failure"] is None


def test_a_job_that_finished_with_other_settings_is_refused_and_stays(two):
    before = manifest("0")
    ended = two(*TWO, "seed=1")
    assert ended.code == 1
    assert "finished with other settings (seed)" in ended.output
    assert ended.error.startswith("Error: 0 of 2 jobs finished")
    assert ended.output.count("transfer_quant refused: The job") == 2
    assert manifest("0") == before
    again = two(*TWO)  # nothing of it was touched
    assert (again.code, again.output.count("2 of 2 jobs finished")) == (0, 1)
    assert list(Path("outputs/sweeps/two").glob("*/refused.json")) == []


def test_jobs_of_another_command_in_its_directory_are_not_of_a_sweep(two):
    again = two(*TINY, "sweep.name=two", "trainer.lr=0.001")
    assert again.code == 0, again.error
    assert "1 of 1 jobs finished; 1 more in its directory are of another command" in again.output
    more = two(*TINY, "sweep.name=two", "trainer.lr=0.001,0.002,0.003")  # has them all
    assert more.output.count(": kept.") == 2
    assert "3 of 3 jobs finished\n" in more.output


@pytest.mark.parametrize("flag", ["hydra.mode=MULTIRUN", "--multi"])
@pytest.mark.slow
def test_sweeps_that_are_started_in_hydras_other_ways_have_directories_of_their_own(sx, flag):
    for values in ("0,1", "0,2"):
        ended = sx(flag, *TINY[1:], f"seed={values}")
        assert ended.code == 0, ended.output
        assert "2 of 2 jobs finished" in ended.output
    names = [path.name for path in Path("outputs/sweeps").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("seed-") for name in names)
    assert sx("-m", *TINY[1:], "seed=0,2").output.count(": kept.") == 2


@pytest.mark.slow
def test_what_a_file_sweeps_names_the_sweep(sx):
    preset = Path("mine/experiment/ladder.yaml")
    for values in ("0,1", "0,2"):
        write_text(preset, f"# @package _global_\nhydra: {{sweeper: {{params: {{seed: '{values}'}}}}}}\n")
        assert sx(*TINY, "experiment=ladder", "--config-dir", "mine").code == 0
    assert len(list(Path("outputs/sweeps").glob("seed-*"))) == 2


def test_what_fails_is_told_in_one_line_without_hydras_own(sx):
    for words in (TINY, TINY[1:]):
        ended = sx(*words, "trainer.lr=5")
        assert ended.code == 1
        assert "Error executing job" not in ended.output
        assert "HYDRA_FULL_ERROR" not in ended.output


def test_a_job_is_labelled_by_what_its_name_does_not_say(tmp_path):
    write_json(tmp_path / "sweep.json", {"command": "python -m sparse_exp -m model=a,b seed=0,1 'name=x y'"})
    words = ["model=yolov5n", "seed=1", "+trainer.lr=0.1", "name=x y"]
    job = Job(0, tmp_path / "0-x", tmp_path, words, {})
    assert _label(job, "yolov5n-digits-dense") == "seed=1 lr=0.1"
    words = ["model=yolov5n", "recipe=transfer_quant", "dataset=custom"]
    job = Job(0, tmp_path / "0-x", tmp_path, words, {})
    assert _label(job, "yolov5n-digits-transfer_quant") == "dataset=custom"


def test_words_that_hydra_writes_in_another_way_are_no_label(two):
    words = ["tracker.system_metrics=false", "trainer.lr=1e-3,2e-3", "recipe.variables.final_lr=1e-5"]
    assert two(*TINY, *words, "sweep.name=other").code == 0
    jobs = [Path(f"outputs/sweeps/other/{number}-yolov5n-digits-transfer_quant") for number in (0, 1)]
    said = [json.loads((job / "manifest.json").read_text())["overrides"] for job in jobs]
    assert "tracker.system_metrics=False" in said[0]
    labels = [_label(Job(0, job, job.parent, words, {}), "x") for job, words in zip(jobs, said, strict=True)]
    assert labels == ["lr=0.001", "lr=0.002"]


@pytest.mark.slow
def test_all_are_made_anew_on_request(two):
    ended = two(*TWO, "seed=1", "sweep.rerun=all")
    assert ended.code == 0
    assert ": kept." not in ended.output
    assert "seed=1" in manifest("1")["overrides"]
    assert list(Path("outputs/sweeps/two").glob("*/superseded.json")) == []


def test_a_refused_rerun_puts_everything_back(two):
    ended = two(*TWO, "sweep.rerun=all", "trainer.nope=1")
    assert ended.code == 1
    assert two(*TWO).output.count(": kept.") == 2


@pytest.mark.slow
def test_failed_jobs_are_made_anew_on_request(sx):
    sx(*TINY, "sweep.name=two", "trainer.lr=0.001,5")
    leftover = Path("outputs/sweeps/two/1-yolov5n-digits-transfer_quant/leftover")
    leftover.touch()
    ended = sx(*TWO, "sweep.rerun=failed")
    assert ended.code == 0
    assert ended.output.count(": kept.") == 1
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.nope=1,2"], "Unknown key trainer.nope"),
        (["model=yolov9,yolov5n"], "yolov9"),
        (["sweep.objectives=[map51]", "stages=[fetch,plan,train,evaluate]"], "Nearest: map50"),
        (["sweep.rerun=some"], "sweep.rerun"),
        (["sweep=nothing"], "nothing"),
        (["launcher.jobs=2"], "launcher=joblib"),
        (["hydra/launcher=joblib"], "Use launcher=joblib instead."),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true does not work here"),
    ],
)
def test_what_is_known_to_be_wrong_is_refused_before_the_first_job(sx, words, said, tmp_path):
    ended = sx(*TINY, *words)
    assert ended.code == 1
    assert said in ended.error
    assert len(ended.error.splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.glob("outputs/sweeps/*"))


@pytest.mark.slow
def test_a_dry_run_leaves_nothing(sx, tmp_path):
    ended = sx(*TINY, "stages=[fetch,plan,train]", "trainer.lr=0.001", "dry_run=true")
    assert ended.code == 0
    assert ended.output.count("stages: fetch") == 1
    assert not list(tmp_path.glob("outputs/sweeps/*"))


def test_a_sweep_that_runs_already_is_refused(two):
    code = "import fcntl, time; f = open('outputs/sweeps/two/.lock', 'a'); fcntl.flock(f, 2)"
    words = [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        ended = two(*TWO)
        other.kill()
    assert ended.code == 1
    assert "is being run by" in ended.error
    assert two(*TWO).code == 0


@pytest.mark.slow
def test_options_may_be_swept_by_pattern(sx):
    ended = sx(*TINY[:1], "model=glob(*)", *TINY[2:], "sweep.name=globbed")
    assert ended.code == 0
    jobs = sorted(path.name for path in Path("outputs/sweeps/globbed").iterdir() if path.name[0].isdigit())
    assert jobs == [f"{i}-yolov5{size}-digits-transfer_quant" for i, size in enumerate("lmnsx")]


def test_objectives_without_a_multirun_are_warned_of(sx):
    ended = sx(*TINY[1:], "sweep.objectives=[map50]")
    assert ended.code == 0
    assert "Without -m" in ended.output


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(sx, monkeypatch):
    Plugins.instance()  # where it is installed, its option is there from now on
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "joblib.yaml", raising=False)
    ended = sx(*TINY, "launcher=joblib", "trainer.lr=0.001,0.002")
    assert ended.code == 1
    said = "launcher=joblib is not installed. Install it with: pip install 'sparse-exp[joblib]'"
    assert ended.error == f"Error: {said}"


def test_a_sweep_goes_on_with_no_run_that_is_typed(two):
    """Its record would become that of a job."""
    (run,) = Path("outputs/sweeps/two").glob("0-*")
    before = (run / "config.yaml").read_bytes()
    ended = two(*TINY, f"resume={run}", "seed=3,4", "sweep.name=other")
    assert ended.code == 1
    assert "is of no use in a sweep. A sweep goes on by its own command" in ended.error
    assert (run / "config.yaml").read_bytes() == before
