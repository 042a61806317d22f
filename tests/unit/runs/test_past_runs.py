import pytest

from sparse_exp.config.places import find_places
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.runs.directory import FORMER, find_directories, locked
from sparse_exp.runs.past import read_run, select_runs


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def select(*targets):
    return select_runs([str(target) for target in targets], find_places())


def test_a_run_is_read_as_it_was_written(past_run, tmp_path):
    metrics = {"val/map50": 0.5, "quantized/convolutions": 60, "weights/origin": "index:x"}
    run = read_run(past_run(tmp_path / "one", metrics, ["seed=1"], "FAILED", tracker_run_id="a" * 32))
    assert (run.name, run.status, run.overrides, run.run_id) == ("one", "FAILED", ("seed=1",), "a" * 32)
    assert run.metrics == {"val/map50": 0.5, "quantized/convolutions": 60.0, "time/evaluate_s": 2.0}


def test_runs_are_found_below_sweeps_once_each(past_run, tmp_path):
    for name in ("sweeps/day/time/0-a", "sweeps/day/time/1-b", "runs/day/time-c"):
        past_run(tmp_path / "outputs" / name, {"val/map50": 0.5})
    write_text(tmp_path / "outputs/sweeps/day/time/0-a/deployment/manifest.json", "{}")  # inside a run
    assert [p.name for p in find_directories(tmp_path / "outputs")] == ["time-c", "0-a", "1-b"]
    assert {run.name for run in select()} == {"time-c", "0-a", "1-b"}  # where runs lie by default
    sweep = tmp_path / "outputs/sweeps/day/time"
    assert [run.name for run in select(sweep / "1-b", sweep)] == ["1-b", "0-a"]


def test_a_broken_manifest_is_left_out_with_a_warning(past_run, tmp_path, caplog):
    past_run(tmp_path / "a", {"val/map50": 0.5})
    write_text(past_run(tmp_path / "b", {}) / "manifest.json", '{"status": "FIN')
    (tmp_path / "b" / FORMER).unlink()
    assert [run.name for run in select(tmp_path)] == ["a"]
    assert str(tmp_path / "b") in caplog.text


def test_a_run_that_has_no_result_yet_counts_without_metrics(past_run, tmp_path):
    (past_run(tmp_path / "a", {}, status="RUNNING") / "result.json").unlink()
    with locked(tmp_path / "a", wait=False):
        assert (select(tmp_path)[0].status, select(tmp_path)[0].metrics) == ("RUNNING", {})
    assert select(tmp_path)[0].status == "KILLED"  # nobody works on it


@pytest.mark.parametrize(("target", "said"), [("nowhere", "Expected RUN to be"), (".", "No run found in .")])
def test_an_empty_selection_is_one_line(target, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as error:
        select(target)
    assert "\n" not in str(error.value)


def test_without_anything_it_says_where_it_looked():
    with pytest.raises(ConfigError, match="outputs/runs and outputs/sweeps"):
        select()


def test_the_command_that_makes_a_run_again(past_run, tmp_path):
    words = [
        "model=yolov5s",
        "hardware.batch_sizes=[1,32]",
        "paths.run=here",
        "overwrite=true",
        "launcher=joblib",
        "launcher.jobs=2",
        "sweep.rerun=all",
        "name='a b'",
    ]
    again = "python -m sparse_exp model=yolov5s 'hardware.batch_sizes=[1,32]'"
    directory = past_run(tmp_path / "one", {}, words)
    assert read_run(directory).command == f"""{again} 'name='"'"'a b'"'"''"""
    sources = "[{path: hydra.conf, provider: hydra}, {path: /my conf, provider: command-line}]"
    write_text(directory / ".hydra" / "hydra.yaml", f"hydra: {{runtime: {{config_sources: {sources}}}}}")
    assert read_run(directory).command.startswith(
        "python -m sparse_exp --config-dir '/my conf' model=yolov5s"
    )
    old = read_run(past_run(tmp_path / "old", {}, None))
    assert old.command == f"python -m sparse_exp.rerun {tmp_path / 'old'}"
