import json
import sys

import pytest

from sparse_exp import rerun
from sparse_exp.config.plain import as_dict
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, SparseExpError
from sparse_exp.files import write_text
from sparse_exp.resolve import rebuild
from sparse_exp.runs import conditions
from sparse_exp.runs.conditions import Difference

CONFIG = """
name: least
seed: 3
stages: [fetch]
model: {name: yolov5n, size: n, weights: scratch}
dataset: {name: digits, generator: digits, imgsz: 96}
recipe: {name: dense, file: dense.md, variables: {num_epochs: 2.0}}
hardware: {name: cpu, engines: [onnxruntime]}
tracker: {backend: none}
paths: {output: outputs, run: outputs/runs/first, mlflow: outputs/mlflow}
overwrite: true
resume: somewhere
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["rerun", *map(str, words)])
    return rerun.main()


def record(**changes):
    manifest = {"version": "0.1.0", "overrides": ["seed=3"], "stages": {}, **changes.pop("manifest", {})}
    return rerun.Record(CONFIG, manifest, changes.pop("environment", []), **changes)


def built(*overrides) -> Experiment:
    return rebuild(CONFIG.replace("resume: somewhere", ""), list(overrides))[0]


def test_values_are_those_of_the_record_and_what_it_lacks_is_named():
    experiment, filled = rebuild(CONFIG.replace("resume: somewhere", ""), [])
    assert (experiment.seed, experiment.recipe.variables, experiment.hardware.engines) == (
        3,
        {"num_epochs": 2.0},
        ["onnxruntime"],
    )
    assert experiment.paths.zoo == "outputs/zoo"  # where it is by default now
    assert {"paths.zoo", "resume", "trainer.lr"} <= set(filled)
    assert not {"seed", "recipe.variables", "hardware.engines"} & set(filled)


def test_values_can_be_changed():
    experiment = built(
        "seed=4", "recipe.variables.num_epochs=5", "hardware.engines=[openvino]", "trainer.patience=null"
    )
    assert (experiment.seed, experiment.recipe.variables["num_epochs"]) == (4, 5)
    assert (experiment.hardware.engines, experiment.trainer.patience) == (["openvino"], None)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed", "KEY=VALUE"),
        ("recipe=dense", "another option of recipe"),
        ("nix=1", "'nix'"),
        ("seed=many", "could not be converted"),
        ("trainer.lr=9", r"trainer\.lr to be above"),
        ("hardware.engines=[a", "cannot be used"),
    ],
)
def test_unusable_overrides_are_one_line(word, said):
    with pytest.raises(ConfigError, match=said) as error:
        built(word)
    assert "\n" not in str(error.value)


INTERPOLATED = [
    "experiment: ${oc.env:SECRET}",
    "recipe: {variables: {a: '${oc.env:SECRET}'}}",
    "stages: ['${oc.env:SECRET}']",
    "${oc.env:SECRET}: 1",
    "stages: !!pairs [{'${oc.env:SECRET}': x}]",
    "stages: !!set {'${oc.env:SECRET}'}",
]


@pytest.mark.parametrize("text", INTERPOLATED)
def test_a_record_reads_nothing_of_this_machine(text, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(ConfigError, match="interpolation") as error:
        rebuild(text, [])
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("text", ["seed: many", "unheard: of", "a: [", "- list", "1"])
def test_a_record_that_does_not_fit_is_one_line(text):
    with pytest.raises(ConfigError, match=r"recorded .* cannot be used") as error:
        rebuild(text, [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["resume=other", "+resume=other", "++resume=other"])
def test_another_run_is_not_gone_on_with(word):
    with pytest.raises(ConfigError, match=r"resume= is of no use here\. To go on with a run, type:"):
        rerun.place_anew(rebuild(CONFIG.replace("resume: somewhere", ""), [])[0], [word])


def test_a_new_run_lies_elsewhere_and_starts_anew():
    experiment = rebuild(CONFIG.replace("resume: somewhere", ""), [])[0]
    experiment.resume = "somewhere"
    rerun.place_anew(experiment)
    assert experiment.paths.run.startswith("outputs/runs/20")
    assert experiment.paths.run.endswith("-least")
    assert (experiment.resume, experiment.overwrite) == (None, False)
    experiment.paths.run, experiment.overwrite = "here", True
    rerun.place_anew(experiment, ["paths.run=here", "overwrite=true"])
    assert (experiment.paths.run, experiment.overwrite) == ("here", True)


FOREIGN = {
    "paths.output": "/srv/theirs",
    "paths.mlflow": "/srv/theirs/mlflow",
    "paths.zoo": "/srv/theirs/zoo",
    "paths.cache": "/srv/theirs/cache",
    "tracker.uri": "http://theirs.example.org",
    "hardware.deepsparse_python": "/srv/theirs/python",
    "name": "../../../../srv/theirs",
}


def test_where_a_foreign_record_says_nothing_is_written(tmp_path):
    experiment = built(*(f"{key}={value}" for key, value in FOREIGN.items()))
    rerun.place_anew(experiment)
    assert "theirs" not in str(as_dict(experiment)["paths"]).replace(experiment.paths.run, "")
    assert (tmp_path / experiment.paths.run).resolve().is_relative_to(tmp_path / "outputs" / "runs")
    assert (experiment.paths.output, experiment.paths.mlflow) == ("outputs", "outputs/mlflow")
    assert (experiment.tracker.uri, experiment.hardware.deepsparse_python) == (None, None)


def test_places_that_are_typed_stay():
    typed = ["paths.output=mine", "paths.cache=cached", "tracker.uri=http://mine.example.org"]
    experiment = built(*typed)
    rerun.place_anew(experiment, typed)
    assert experiment.paths.run.startswith("mine/runs/20")
    assert (experiment.paths.output, experiment.paths.mlflow) == ("mine", "mine/mlflow")
    assert (experiment.paths.cache, experiment.tracker.uri) == ("cached", "http://mine.example.org")


@pytest.mark.parametrize(
    "change", [{"stages": ["fetch"]}, {"overrides": 1}, {"conditions": {"code": 1}}, {"environments": [1]}]
)
def test_a_manifest_of_another_kind_is_one_line(monkeypatch, tmp_path, change):
    write_text(tmp_path / "past" / "config.yaml", CONFIG)
    manifest = {"overrides": [], "stages": {"fetch": {"fingerprint": "f"}}, **change}
    write_text(tmp_path / "past" / "manifest.json", json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read: .* no manifest\. ") as error:
        command(monkeypatch, "past", "--dry-run")
    assert "\n" not in str(error.value)


def test_differences_are_found_by_kind():
    conditions = {"code": {"version": "0.0.1", "sources": "00"}, "host": {"cpu": "Z80"}, "recipe": "ff" * 32}
    stages = {"fetch": {"facts": {"dataset": "dd"}}}
    past = record(manifest={"conditions": conditions, "stages": stages}, environment=["python==2.7.18"])
    found = rerun.differences(past, built(), ["seed"])
    assert {each.kind for each in found} == {"code", "configuration", "packages", "data", "host"}
    assert Difference("data", "digest of digits", "dd", "not on this machine yet") in found
    assert Difference("configuration", "seed", "not recorded", "3") in found
    assert {each.what for each in found} >= {"recipe dense.md", "python", "cpu"}


def test_what_old_runs_did_not_record_is_taken_from_the_tags():
    tags = {
        "mlflow.source.git.commit": "abc",
        "git.dirty": "false",
        "host.cpu": "Z80",
        "overrides": '["seed=9"]',
    }
    past = rerun.Record(CONFIG, {}, [], tags={**tags, "dataset.digest": "dd"})
    assert past.conditions["code"] == {"commit": "abc", "dirty": "false"}
    assert past.conditions["host"] == {"cpu": "Z80"}
    assert (past.data, past.overrides) == ("dd", ["seed=9"])


@pytest.mark.parametrize("run", ["nowhere", "."])
def test_what_is_no_run_is_one_line(run, monkeypatch):
    with pytest.raises(ConfigError, match="Expected RUN to be"):
        command(monkeypatch, run)
    with pytest.raises(SparseExpError, match="a database with runs"):
        command(monkeypatch, "0" * 32)


def test_a_run_is_made_again(monkeypatch, capsys, tmp_path):
    from sparse_exp.experiment import run

    first = built()
    first.overwrite = False
    run(first, {"config.yaml": "composed: true\n", "overrides.yaml": "- seed=3\n"}, ["seed=3"])

    before = sorted(tmp_path.rglob("manifest.json"))
    assert command(monkeypatch, "outputs/runs/first", "--dry-run") == 0
    assert command(monkeypatch, "outputs/runs/first", "dry_run=true") == 0
    assert sorted(tmp_path.rglob("manifest.json")) == before
    said = "Code, packages, data and host are as they were for outputs/runs/first.\n"
    assert capsys.readouterr().out == said * 2

    assert command(monkeypatch, "outputs/runs/first", "seed=4", "name=a, b") == 0
    (again,) = set(tmp_path.rglob("manifest.json")) - set(before)
    manifests = [json.loads(path.read_text()) for path in (*before, again)]
    assert manifests[1]["overrides"] == ["seed=3", "seed=4", 'name="a, b"']  # the last in Hydra's quotes
    assert manifests[0]["conditions"] == manifests[1]["conditions"]
    assert manifests[0]["stages"]["fetch"]["facts"] == manifests[1]["stages"]["fetch"]["facts"]
    assert rebuild((again.parent / "config.yaml").read_text(), [])[0].seed == 4
    assert (again.parent / ".hydra" / "config.yaml").read_text() == "composed: true\n"

    manifest = manifests[0]
    manifest["stages"]["fetch"]["facts"]["dataset"] = "other"
    write_text(before[0], json.dumps(manifest))
    command(monkeypatch, "outputs/runs/first", "--dry-run")
    out = capsys.readouterr().out
    assert "digest of digits" in out
    assert "other" in out


def test_stages_that_were_done_under_other_conditions_are_named(monkeypatch):
    now = {
        "code": conditions.code_facts(),
        "host": conditions.host_record(),
        "packages": conditions.packages(),
    }
    then = {**now, "host": {**now["host"], "cpu": "Z80"}, "packages": ["python==2.7.18"]}
    stages = {
        "train": {"conditions": "then"},
        "evaluate": {"conditions": "then"},
        "benchmark": {"conditions": "now"},
    }
    past = record(manifest={"stages": stages, "environments": {"now": now, "then": then}})
    assert list(past.made_with) == ["train, evaluate", "benchmark"]
    found = {each.what: each.then for each in rerun.differences(past, rerun.rebuild(CONFIG, [])[0])}
    assert found["cpu (train, evaluate)"] == "Z80"
    assert found["python (train, evaluate)"] == "2.7.18"
    assert not any("benchmark" in what for what in found)


def test_what_the_data_chose_is_taken_again_where_nothing_else_is_said():
    manifest = {"settled": {"batch_size": 8, "num_epochs": 6.0, "why": {}}}
    bare = CONFIG.replace("resume: somewhere", "trainer: {batch_size: auto}").replace("num_epochs: 2.0", "")

    def words(*overrides: str) -> list[str]:
        return rerun.settled_words(manifest, rebuild(bare, list(overrides))[0])

    assert words() == ["trainer.batch_size=8", "recipe.variables.num_epochs=6.0"]
    assert words("trainer.batch_size=2", "recipe.num_epochs=3") == []
    assert words("model.num_epochs=3", "trainer.batch_size=2") == []
    assert rerun.settled_words({}, rebuild(bare, [])[0]) == []
    again = rebuild(bare, words())[0]
    assert (again.trainer.batch_size, again.recipe.variables) == (8, {"num_epochs": 6.0})
