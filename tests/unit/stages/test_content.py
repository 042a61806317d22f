"""Stages depend on what is in files, not on where they lie: what changes in place is noticed."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sparse_exp import __version__
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import (
    HardwareConfig,
    ModelConfig,
    RecipeConfig,
    RecoveryConfig,
    SourceConfig,
    TrainerConfig,
)
from sparse_exp.errors import ConfigError, DataError, SourceUnavailable
from sparse_exp.files import fingerprint, write_json, write_text
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.resolve import read_record
from sparse_exp.runs.directory import MANIFEST, Run, StageRecord
from sparse_exp.stages.base import Outcome
from sparse_exp.stages.fingerprint import _as_before
from sparse_exp.stages.registry import STAGES
from sparse_exp.sweep.job import Job, run_job

ALL = ["fetch", "plan", "train", "evaluate"]
EARLIER = {"trainer": TrainerConfig(monitor="map50", close_mosaic=0.0)}  # as version 0.1.0 trained
DISTILL = RecipeConfig(name="distill", file="distill.md", variables={"num_epochs": 2})


@pytest.fixture(autouse=True)
def _told(caplog) -> None:
    caplog.set_level(logging.INFO, "sparse_exp")


def change_a_label(data: Path) -> None:
    """Give the first box of the first image another class."""
    path = min((data.parent / "labels" / "train").glob("*.txt"))
    first, *others = path.read_text(encoding="utf-8").splitlines()
    digit, _, box = first.partition(" ")
    write_text(path, "\n".join([f"{(int(digit) + 1) % 10} {box}", *others]) + "\n")


def again(caplog) -> list[str]:
    """What the log says of stages that are done again."""
    lines = [message for message in caplog.messages if ": done again" in message]
    caplog.clear()
    return lines


def behind(first: str, reason: str) -> list[str]:
    """The lines of a run in which a stage changed for a reason of its own."""
    rest = ALL[ALL.index(first) + 1 :]
    return [
        f"== {first}: done again, as {reason} changed",
        *(f"== {stage}: done again, as a stage before it changed" for stage in rest),
    ]


def test_nothing_is_done_again_while_the_files_are_the_same(done, go, data, start, caplog):
    first = go()
    assert done() == ALL
    shutil.copytree(data.parent, "copy")
    for path in (start, *data.parent.rglob("*.txt")):  # written once more as they were
        write_text(path, path.read_text(encoding="utf-8"))
    second = go()
    assert done() == again(caplog) == []
    assert second["stages"] == first["stages"]


def test_a_label_that_changes_between_two_starts(done, go, data, caplog):
    first = go()
    done()
    change_a_label(data)
    second = go()
    assert done() == ALL
    assert again(caplog) == behind("fetch", "the content of the data set")
    digests = [manifest["stages"]["fetch"]["facts"]["dataset"] for manifest in (first, second)]
    assert digests[0] != digests[1]
    go()
    assert done() == []


def test_a_start_checkpoint_that_is_replaced_in_place(done, go, start, caplog):
    first = go()
    done()
    write_text(start, "another")
    second = go()
    assert done() == ALL
    assert again(caplog) == behind("fetch", "the content of the start checkpoint")
    facts = [manifest["stages"]["fetch"]["facts"] for manifest in (first, second)]
    assert facts[0]["sha256"] != facts[1]["sha256"]
    assert [fact["path"] for fact in facts] == [str(start)] * 2


def test_a_teacher_that_is_replaced_in_place(done, go, tmp_path, caplog):
    teacher = write_text(tmp_path / "teacher.pt", "teacher")
    recipe = replace(DISTILL, teacher=str(teacher))
    go(recipe=recipe)
    go(recipe=recipe)
    assert done() == ALL
    write_text(teacher, "another")
    go(recipe=recipe)
    assert done() == ALL[1:]
    assert again(caplog) == behind("plan", "the content of the teacher")
    teacher.unlink()
    go(recipe=recipe)
    assert done() == []
    assert f"The teacher {teacher} is not on this machine: it counts as unchanged." in caplog.messages


def test_a_teacher_that_is_not_used_says_nothing(done, go, tmp_path):
    teacher = write_text(tmp_path / "teacher.pt", "teacher")
    recipe = RecipeConfig(name="transfer", file="transfer.md", teacher=str(teacher))
    go(recipe=recipe)
    write_text(teacher, "another")
    go(recipe=recipe)
    assert done() == ALL


def test_a_teacher_that_had_to_be_fetched_first_is_the_same_afterwards(done, go, server):
    recipe = replace(DISTILL, teacher=f"{server.url}/teacher.pt")
    for _ in range(2):
        go(recipe=recipe)
    assert done() == ALL
    assert server.requests == ["/teacher.pt"]


def test_shares_by_measured_times_stay_those_of_the_plan(done, go, monkeypatch, caplog):
    def plan_with(share: float):
        real = STAGES["plan"]

        def plan(context):
            return replace(real.run(context), facts={"shares": {"model.2.cv1.conv": share}})

        monkeypatch.setitem(STAGES, "plan", replace(real, run=plan))

    changes = {
        "recipe": RecipeConfig(
            name="transfer", file="transfer.md", variables={"num_epochs": 1}, shares="speed"
        ),
        "hardware": HardwareConfig(name="cpu", engines=["mnn"], cores=[1]),
    }
    plan_with(0.5)
    first = go(**changes)
    assert done() == ALL
    plan_with(0.9)  # what it would measure now
    second = go(**changes)
    assert done() == []
    assert second["stages"]["plan"]["facts"]["shares"] == {"model.2.cv1.conv": 0.5}
    assert second["stages"] == first["stages"]
    del first["stages"]["plan"]
    write_json(Path("run") / MANIFEST, first)  # the plan is lost: the training was of other shares
    caplog.clear()
    go(**changes)
    assert done() == ALL[1:]
    assert again(caplog)[0] == "== train: done again, as shares changed"
    changes["hardware"] = replace(changes["hardware"], batch_sizes=[2])
    go(**changes)
    assert done() == ALL[1:]
    assert again(caplog)[0] == "== plan: done again, as hardware changed"
    changes["hardware"] = replace(changes["hardware"], duration_s=9.0)  # of the benchmark alone
    go(**changes)
    assert done() == []


def test_a_recipe_beside_its_name_was_seen_before(done, go, tmp_path, caplog):
    """As before: the recipe counts as it runs, not its file."""
    mine = tmp_path / "mine.md"
    shutil.copy(recipe_path("transfer.md"), mine)
    recipe = RecipeConfig(name="mine", file=str(mine), variables={"num_epochs": 1})
    go(recipe=recipe)
    done()
    write_text(mine, mine.read_text(encoding="utf-8").replace("init_lr: 0.", "init_lr: 0.0"))
    go(recipe=recipe)
    assert done() == ALL[1:]
    assert again(caplog) == behind("plan", "recipe")


@pytest.mark.parametrize("lost", ["yaml", "images"])
def test_a_run_whose_data_set_is_gone_keeps_what_is_finished(done, go, data, caplog, lost):
    first = go()
    done()
    if lost == "yaml":
        data.unlink()
    else:
        shutil.rmtree(data.parent / "images")
    caplog.clear()
    second = go()
    assert (done(), second["status"]) == ([], "FINISHED")
    assert second["stages"] == first["stages"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("The data set own ")
    assert "it counts as unchanged" in warning
    assert "\n" not in warning
    with pytest.raises(DataError):  # but it is needed for what is not
        go(model=ModelConfig("yolov5n", "n", weights="scratch"))


def test_a_run_that_begins_behind_the_fetch_depends_on_its_data_too(done, go, data, start, caplog):
    only = {"stages": ["evaluate"], "checkpoint": str(start)}
    go(**only)
    change_a_label(data)
    go(**only)
    assert done() == ["evaluate"] * 2
    assert again(caplog) == ["== evaluate: done again, as the content of the data set changed"]


def test_a_finished_run_needs_no_start_checkpoint(done, go, start, caplog):
    go()
    start.unlink()
    go()
    assert done() == ALL
    assert "The start checkpoint is not on this machine: it counts as unchanged." in caplog.messages


@pytest.fixture
def stopped(done, go, monkeypatch, tmp_path):
    """A run that was stopped where its training began, its start in the first of two places.

    A function that goes on with it, and returns the start of the training; and the two places.
    """
    one, other = (write_text(tmp_path / f"{name}.pt", "same") for name in ("one", "other"))
    sources = [SourceConfig(uri=str(path)) for path in (one, other)]
    model = ModelConfig("yolov5n", "n", sources=sources)

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "train", replace(STAGES["train"], run=stop))
        with pytest.raises(KeyboardInterrupt):
            go(model=model)
    done()
    found, real = [], STAGES["train"].run

    def look(context) -> Outcome:
        found.append(context.start)
        return real(context)

    def resume() -> list:
        go(model=model)
        return found

    monkeypatch.setitem(STAGES, "train", replace(STAGES["train"], run=look))
    return resume, one, other


def test_a_start_that_lies_elsewhere_now_is_found_there(stopped, done):
    resume, one, other = stopped
    one.unlink()
    (found,) = resume()
    assert found.file.path == other
    assert done() == ["train", "evaluate"]


def test_a_start_that_is_another_elsewhere_is_fetched_anew(stopped, done):
    resume, one, other = stopped
    one.unlink()
    write_text(other, "another")
    (found,) = resume()
    assert found.file.path == other
    assert done() == ALL


def test_a_start_that_is_gone_stops_what_needs_it(stopped, done):
    resume, *both = stopped
    for path in both:
        path.unlink()
    with pytest.raises(SourceUnavailable):
        resume()
    assert done() == []


@pytest.fixture
def job(experiment):
    """A function that runs a job of a sweep as its launcher does; its run."""

    def run(number: int, **changes) -> Run:
        directory = Path(f"sweep/{number}-tiny").absolute()
        run_job(
            Job(number, directory, directory.parent, [], {}), experiment(f"sweep/{number}-tiny", **changes)
        )
        return Run.read(directory)

    return run


@pytest.mark.parametrize("what", ["data set", "start checkpoint"])
def test_jobs_of_a_sweep_see_what_changed_since(done, job, data, start, what):
    job(0)
    job(0)
    assert done() == ALL  # kept
    change_a_label(data) if what == "data set" else write_text(start, "another")
    with pytest.raises(ConfigError, match=rf"finished with other settings \(the content of the {what}\)"):
        job(0)
    origins = {name: record.shared_from for name, record in job(1).records.items()}
    assert origins == dict.fromkeys(ALL)
    assert done() == ALL
    origins = {name: record.shared_from for name, record in job(2).records.items()}
    assert origins == dict.fromkeys(ALL, "1-tiny")


def test_jobs_of_a_sweep_see_what_changed_since_in_files_that_they_name(done, job, tmp_path):
    """The checkpoint of a job without training, its teacher, and the dense run that it is compared with."""
    files = teacher, own = [write_text(tmp_path / name, "one") for name in ("teacher.pt", "own.pt")]
    dense = job(7)
    dense.record("evaluate", StageRecord("mark", metrics={"val/map50": 0.5}))
    jobs = {
        "checkpoint": {"stages": ["evaluate"], "checkpoint": str(own)},
        "the content of the teacher": {"recipe": replace(DISTILL, teacher=str(teacher))},
        "the content of the dense baseline": {
            "stages": [*ALL[:2], "baseline", *ALL[2:]], "recovery": RecoveryConfig(baseline=str(dense.path))
        },
    }  # fmt: skip
    for _ in range(2):
        said = done()
        for number, changes in enumerate(jobs.values()):
            job(number, **changes)
    assert (bool(said), done()) == (True, [])  # kept
    for file in files:
        write_text(file, "another")
    dense.record("evaluate", StageRecord("mark", metrics={"val/map50": 0.6}))
    for number, (what, changes) in enumerate(jobs.items()):
        with pytest.raises(ConfigError, match=rf"finished with other settings \({what}"):
            job(number, **changes)


def test_a_finished_job_whose_files_are_gone_is_gone_on_with(done, job, caplog):
    run = job(0)
    (run.path / "train.txt").unlink()
    job(0)
    assert done() == [*ALL, "train"]
    assert "Job 0 has finished, but train.txt changed or is gone: going on with it." in caplog.messages
    assert (run.path / "train.txt").is_file()
    assert Run.read(run.path).status == "FINISHED"


def test_a_job_whose_data_are_gone_stays_finished(done, job, data, start):
    job(0)
    shutil.rmtree(data.parent)
    start.unlink()
    job(0)
    assert done() == ALL


def known_before() -> dict:
    """The configuration of a run of version 0.1.0, for the keys that it has."""
    archive = Path(__file__).parents[2] / "data" / "run-0.1.0.tar.xz"
    with tarfile.open(archive) as opened:
        name = next(name for name in opened.getnames() if name.endswith("quant/config.yaml"))
        return yaml.safe_load(opened.extractfile(name))


def as_known(value, then):
    """A value without the keys that were not there."""
    if not isinstance(value, dict) or not then:
        return value
    return {key: as_known(each, then[key]) for key, each in value.items() if key in then}


def test_a_record_of_an_earlier_version_says_what_that_version_did():
    """All that came since is filled in with what changes nothing, and left out of its fingerprint."""
    known = known_before()
    del known["hardware"]["max_spread"]
    config = as_dict(OmegaConf.to_object(read_record(yaml.safe_dump(known))))
    assert config["trainer"]["monitor"] == "map50"
    before = _as_before({group: config[group] for group in ("trainer", "model", "dataset")})
    assert before["trainer"] == known["trainer"]
    assert before["dataset"] == known["dataset"]
    assert before["model"] == known["model"]
    recipe = _as_before({"recipe": config["recipe"]})["recipe"]
    as_it_runs = {"weight_scales", "weight_bits", "train_outputs"}  # counted otherwise
    assert {key: value for key, value in recipe.items() if key not in as_it_runs} == known["recipe"]


def marks_before(experiment, recipe: Recipe) -> dict[str, str]:
    """Fingerprints as version 0.1.0 took them, when it knew paths only."""
    config = as_known(as_dict(experiment), known_before())
    resolved = ("name", "file", "variables", "num_epochs")
    rest = {key: value for key, value in config["recipe"].items() if key not in resolved}
    parts = {
        "fetch": {"model": config["model"], "dataset": config["dataset"], "start": True},
        "plan": {
            "seed": config["seed"],
            "trainer": config["trainer"],
            "recipe": {"text": recipe.text, **rest},
        },
        "train": {},
        "evaluate": {"checkpoint": None},
    }
    marks, before = {}, ""
    for stage in ALL:
        before = marks[stage] = fingerprint(stage, before, parts[stage], __version__)
    return marks


@pytest.fixture
def old(done, go, experiment) -> None:
    """A finished run as that version left it."""
    manifest = go(**EARLIER)
    recipe = Recipe.from_file(recipe_path("transfer.md"), {"num_epochs": 1})
    kept = ("outputs", "metrics", "seconds", "facts", "shared_from")
    marks = marks_before(experiment(), recipe)
    manifest["stages"] = {
        name: {"fingerprint": marks[name], **{key: record[key] for key in kept}}
        for name, record in manifest["stages"].items()
    }
    del manifest["environments"], manifest["stages"]["fetch"]["facts"]["path"]
    write_json(Path("run", MANIFEST), manifest)
    done()


def test_a_run_of_an_earlier_version_goes_on_where_nothing_changed(old, done, go, start):
    record = go(**EARLIER)["stages"]["fetch"]
    assert done() == []
    assert record["facts"]["path"] == str(start)
    assert {"the content of the data set", "the content of the start checkpoint"} <= set(record["parts"])
    assert record["step"] == 100  # hundredths of an epoch


@pytest.mark.parametrize("what", ["data", "start"])
def test_a_run_of_an_earlier_version_is_done_again_where_files_changed(old, done, go, data, start, what):
    change_a_label(data) if what == "data" else write_text(start, "another")
    go(**EARLIER)
    assert done() == ALL
    assert json.loads(Path("run", MANIFEST).read_text())["status"] == "FINISHED"
