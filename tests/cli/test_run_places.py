"""Where a run goes: nobody's directory is taken, whoever else starts in the same moment."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from command import command_line

from sparse_exp import cli
from sparse_exp.compare import __main__ as compare
from sparse_exp.config import places
from sparse_exp.config.places import chosen_places, find_places
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.runs.directory import Run, find_directories
from sparse_exp.runs.past import select_runs

__all__ = ["command_line"]


def test_a_place_by_the_time_is_numbered_where_it_is_taken_and_one_that_was_named_is_refused(
    command_line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=smoke", "model.weights=scratch", "stages=[fetch]", "tracker=none", "paths.cache=c"]
    for _ in range(2):
        assert command_line(*words, "paths.run='runs/a ${now:%Y}'").code == 0
        refused = command_line(*words, "paths.run=named")
    assert [path.name[:1] + path.name[6:] for path in sorted((tmp_path / "runs").iterdir())] == ["a", "a-2"]
    assert refused.error.startswith("Error: The run directory named exists.")


def test_of_starts_that_meet_in_a_directory_of_hydras_one_has_it_and_the_others_are_refused(
    command_line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=smoke", "model.weights=scratch", "stages=[fetch]", "tracker=none", "paths.cache=c"]
    assert command_line(*words, "paths.run=first").code == 0  # the data set is there
    fork = multiprocessing.get_context("fork")
    together, ended = fork.Barrier(3), fork.SimpleQueue()

    def start(number: int) -> None:
        together.wait()
        own = command_line(*words, f"seed={number}", "hydra.run.dir='a ${now:%Y}'")
        ended.put((number, own.code, own.error))

    starts = [fork.Process(target=start, args=(number,)) for number in range(3)]
    for process in starts:
        process.start()
    seen = [ended.get() for _ in starts]
    for process in starts:
        process.join()
    ((winner, _, _),) = [each for each in seen if each[1] == 0]
    errors = [error for number, _, error in seen if number != winner]
    assert all("\n" not in error and ("worked on by" in error or "exists" in error) for error in errors), (
        errors
    )
    (run,) = [path for path in find_directories(tmp_path) if path.name != "first"]
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == winner
    assert (run / "sparse_exp.log").read_text().count("== fetch") == 1


def test_a_typed_server_wins_over_the_environment_and_that_over_files(
    command_line, tmp_path, monkeypatch, new_database
):
    monkeypatch.chdir(tmp_path)
    for name in ("typed", "environment", "file"):
        shutil.copy(new_database, tmp_path / f"{name}.db")
    local = tmp_path / "mine" / "local" / "default.yaml"
    write_text(local, f"# @package _global_\ntracker: {{uri: 'sqlite:///{tmp_path}/file.db'}}\n")
    words = ["experiment=smoke", "model.weights=scratch", "stages=[fetch]", "tracker.system_metrics=false"]
    words += ["paths.cache=c", "--config-dir", "mine"]

    def tracked(*more: str) -> str:
        """The name of the database that a run was told to."""
        assert command_line(*more, *words).code == 0
        (name,) = [path.stem for path in tmp_path.glob("*.db") if runs(path) > before[path.stem]]
        before[name] += 1
        return name

    def runs(path: Path) -> int:
        with closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT count(*) FROM runs").fetchone()[0]

    before = dict.fromkeys(("typed", "environment", "file"), 0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracked() == "file"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    assert tracked() == "environment"
    assert tracked(f"tracker.uri='sqlite:///{tmp_path}/typed.db'") == "typed"
    made = map(Run.read, find_directories(tmp_path / "outputs" / "runs"))
    (run,) = [run.path for run in made if run.state["tracker_address"].endswith("/typed.db")]
    assert command_line(f"resume='{run}'").code == 0
    assert {name: runs(tmp_path / f"{name}.db") for name in before} == before  # gone on with there
    assert compare_finds(monkeypatch, "--uri", f"sqlite:///{tmp_path}/typed.db") == 1


def compare_finds(monkeypatch, *options: str) -> int:
    """How many runs ``compare`` finds in an experiment."""
    monkeypatch.setattr(sys, "argv", ["compare", "--experiment", "sparse_exp", *options])
    return len(select_runs([], chosen_places(compare._options()), experiment="sparse_exp"))


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of ``conf``, as of another machine; without its settings."""
    copy = shutil.copytree(CONF_DIRECTORY, tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    for module in (cli, places):
        monkeypatch.setattr(module, "CONF_DIRECTORY", copy)
    monkeypatch.chdir(tmp_path)
    for variable in places.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return copy


def test_of_two_files_of_settings_that_of_config_dir_wins_key_by_key(command_line, conf):
    write_text(
        conf / "local/default.yaml",
        "# @package _global_\ndefaults: [override /model: yolov5n]\npaths: {output: machine, zoo: machine}\n",
    )
    own = "# @package _global_\ndefaults: [override /dataset: digits]\npaths: {output: own}\n"
    write_text(Path("mine/local/default.yaml"), own)

    def found(*words: str) -> tuple[str, ...]:
        shown = yaml.safe_load(command_line(*words, "--cfg", "job").output)
        return (
            shown["paths"]["output"],
            shown["paths"]["zoo"],
            shown["model"]["name"],
            shown["dataset"]["name"],
        )

    assert found() == ("machine", "machine", "yolov5n", "trees")
    assert found("--config-dir", "mine") == ("own", "machine", "yolov5n", "digits")
    assert found("--config-dir=mine") == ("own", "machine", "yolov5n", "digits")
    assert found("-cd", "mine", "paths.output=typed") == ("typed", "machine", "yolov5n", "digits")
    for config_dir, output in ((None, "machine"), ("mine", "own")):
        assert find_places(config_dir).output == Path(output)
        assert find_places(config_dir).zoo == Path("machine").absolute()


def test_an_own_file_with_the_name_of_a_shipped_one_is_refused(command_line, conf):
    write_text(Path("mine/model/yolov5s.yaml"), "name: mine\n")
    ended = command_line("--config-dir", "mine", "--cfg", "job")
    said = "mine/model/yolov5s.yaml has the name of a shipped option, which is taken instead. Rename it."
    assert (ended.code, ended.error) == (1, f"Error: {said}")
    assert command_line("--config-dir", str(conf), "--cfg", "job").code == 0


def test_a_file_of_settings_that_is_no_yaml_is_named_with_the_line(command_line, conf):
    for shipped in (False, True):
        if shipped:  # then it is a layer over that of `conf`
            write_text(conf / "local/default.yaml", "# @package _global_\nseed: 1\n")
        write_text(Path("mine/local/default.yaml"), "# @package _global_\npaths: {output: [own}\n")
        ended = command_line("--config-dir", "mine", "--cfg", "job")
        assert ended.code == 1
        assert "mine/local/default.yaml, line 2: " in ended.error
        assert ended.error.endswith(". Correct the file.")
        assert len(ended.error.splitlines()) == 1
        with pytest.raises(ConfigError, match=r"mine/local/default\.yaml, line 2: .* Correct the file\.$"):
            find_places("mine")
