"""``resume=RUN``: the run's own recorded configuration, with the words of the command line laid over it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from command import command_line

from sparse_exp import cli, experiment
from sparse_exp.config.plain import CONF_DIRECTORY, as_dict, as_yaml, recipe_path
from sparse_exp.config.schema import STAGES, Experiment, HardwareConfig
from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of
from sparse_exp.predict.models import find_model
from sparse_exp.runs.past import read_run
from sparse_exp.zoo.publish import publish_run, read_finished

__all__ = ["command_line"]

RUN = experiment.run
# Another value than the default's in many groups, and texts that Hydra wants to be quoted.
WORDS = [
    "experiment=smoke", "seed=7", "name='a b=c, d'", "publish=auto", "tracker=none", "dataset.imgsz=64",
    "recipe.variables.num_epochs=2", "hardware.engines=[onnxruntime]", "hardware.duration_s=0.4",
    "trainer.augment.mosaic=0.25", "trainer.augment.hue=0.1", "trainer.patience=3",
]  # fmt: skip
UNPUBLISHED = [word for word in WORDS if word != "publish=auto"]
RESUME = "resume='a run=1'"
PLACE = ("paths", "resume", "overwrite", "dry_run", "sweep", "launcher", "ray")


@dataclass
class Start:
    """What `sparse_exp.experiment.run` was called with."""

    experiment: Experiment
    hydra_files: dict[str, str]
    words: list[str] | None
    whole: Experiment | None = None
    numbered: bool = False


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function of words: what of a command line reaches the experiment, which is not run."""
    seen: list[Start] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSE_EXP_ZOO", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(experiment, "run", lambda *given, **named: seen.append(Start(*given, **named)))

    def of(*words: str) -> Start:
        monkeypatch.setattr(sys, "argv", ["sparse-exp", *words])
        cli.main()
        return seen.pop()

    return of


@pytest.fixture(scope="module")
def firsts() -> dict[tuple[str, ...], Start]:
    """First starts by their words: composing takes its time."""
    return {}


@pytest.fixture
def record(start, firsts, tmp_path):
    """A function of words: the directory of a run that was started with them and killed while it trained."""

    def of(*words: str, finished: tuple[str, ...] = STAGES[:3]) -> Path:
        first = firsts[words] = firsts.get(words) or start(*words, "paths.run='a run=1'")
        run = tmp_path / "a run=1"
        (run / ".hydra").mkdir(parents=True)
        (run / "config.yaml").write_text(as_yaml(first.experiment), encoding="utf-8")
        for name, text in first.hydra_files.items():
            (run / ".hydra" / name).write_text(text, encoding="utf-8")
        recipe = {"recipe": sha256_of(recipe_path(first.experiment.recipe.file))}
        stages = {stage: {"fingerprint": stage} for stage in finished}
        state = {"status": "KILLED", "overrides": first.words, "conditions": recipe, "stages": stages}
        (run / "manifest.json").write_text(json.dumps(state), encoding="utf-8")
        return run

    return of


@pytest.fixture
def run(record) -> Path:
    return record(*WORDS)


def recorded(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def flat(plain, prefix="") -> dict:
    if not isinstance(plain, dict):
        return {prefix[:-1]: plain}
    return {k: v for name, value in plain.items() for k, v in flat(value, f"{prefix}{name}.").items()}


def changes(run: Path, start: Start) -> dict[str, tuple]:
    """Keys that a start has otherwise than the record, each with both values."""
    then, now = flat(recorded(run)), flat(as_dict(start.experiment))
    assert (then.pop("resume"), now.pop("resume")) == (None, "a run=1")
    return {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}


def as_started(run: Path, again: Start) -> None:
    """Assert that a start does, and leaves on record, what the run was started with."""
    assert changes(run, again) == {}
    assert as_yaml(again.whole) == (run / "config.yaml").read_text(encoding="utf-8")
    overrides = (run / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
    assert again.words == yaml.safe_load(overrides)
    assert again.hydra_files == {"overrides.yaml": overrides}


@pytest.mark.parametrize("words", [[], WORDS])
def test_a_run_goes_on_as_it_was_configured(run, start, words):
    as_started(run, start(*words, RESUME))


def test_words_that_add_or_take_away_may_be_said_again(record, start):
    words = [*WORDS, "+recipe.variables.mine=1", "~recipe.variables.init_lr", "~export"]
    as_started(record(*words), start(*words, RESUME))


def test_words_are_laid_over_the_record(run, start):
    words = [
        "seed=0", "name='x, y=\"z\"'", "trainer.patience=null", "hardware.engines=[openvino]",
        "trainer.augment={mosaic:1.0}", "++export.opset=14", "trainer.lr=0.5", "trainer.lr=0.25",
        "dataset.workers=3", "dry_run=true",
    ]  # fmt: skip
    assert changes(run, start(*words, RESUME)) == {
        "seed": (7, 0),  # the default, but said
        "name": ("a b=c, d", 'x, y="z"'),
        "trainer.patience": (3, None),
        "hardware.engines": (["onnxruntime"], ["openvino"]),
        "trainer.augment.mosaic": (0.25, 1.0),  # and hue stays
        "export.opset": (13, 14),
        "trainer.lr": (0.001, 0.25),
        "dataset.workers": (None, 3),
        "dry_run": (False, True),
    }


def test_a_word_may_refer_to_the_record(run, start):
    changed = changes(run, start("name=${model.size}-${seed}-${trainer.patience}", "seed=9", RESUME))
    assert changed == {"name": ("a b=c, d", "n-9-3"), "seed": (7, 9)}


def test_a_group_is_replaced_as_a_whole(run, start):
    option = yaml.safe_load((CONF_DIRECTORY / "hardware" / "throughput.yaml").read_text())
    again = start("hardware.repeats=4", "hardware=throughput", "tracker=mlflow", RESUME)
    assert again.experiment.hardware == HardwareConfig(**{**option, "repeats": 4})
    others = {key: value for key, value in changes(run, again).items() if not key.startswith("hardware.")}
    assert others == {"tracker.backend": ("none", "mlflow")}


def test_of_a_preset_counts_what_it_changes(run, start, tmp_path):
    texts = {
        "experiment/mine": "# @package _global_\ndefaults: [{override /export: loose}]\n"
        "hardware: {repeats: 9, tune_s: 0.3}\n",
        "export/loose": "opset: 15\nbox_atol: 2.0\n",
    }
    for name, text in texts.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    again = start("--config-dir", "conf", "experiment=mine", "export.opset=14", RESUME)
    assert changes(run, again) == {
        "hardware.repeats": (3, 9),  # hardware.tune_s is 0.3 anyway
        "export.opset": (13, 14),
        "export.box_atol": (1.0, 2.0),
    }
    assert {"hardware.repeats=9", "export.opset=14", "export.box_atol=2.0"} <= set(again.words)


@pytest.mark.parametrize(
    "words",
    [
        ["seed=8", "name='x, y'", "trainer.patience=null", "stages=[report]", "publish=null"],
        ["hardware=throughput", "hardware.cores=[1]", "tracker=mlflow", "tracker.experiment='a, b'"],
    ],
)
def test_the_recorded_words_make_the_run_as_it_is_now(run, start, words):
    again = start(*words, RESUME)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "overrides": again.words}))
    keys = [word.partition("=")[0] for word in again.words]
    assert len(keys) == len(set(keys))  # the later ones have taken the place of the former
    anew = start(*read_run(run).words).experiment
    whole, made = ({k: v for k, v in as_dict(e).items() if k not in PLACE} for e in (again.whole, anew))
    assert whole == made


def test_where_the_first_words_are_not_known_there_are_none(run, start):
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["overrides"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    again = start("seed=8", RESUME)
    assert (again.words, again.hydra_files) == (None, {})
    assert changes(run, again) == {"seed": (7, 8)}


def test_stages_of_a_later_start_are_added_to_those_of_the_run(record, start):
    run = record(*UNPUBLISHED, "stages=[fetch,plan,train]")
    again = start("stages=[export,evaluate]", RESUME)
    assert again.experiment.stages == ["evaluate", "export"]
    assert again.whole.stages == ["fetch", "plan", "train", "evaluate", "export"]
    assert "stages=[fetch,plan,train,evaluate,export]" in again.words
    assert "stages=[fetch,plan,train]" not in again.words
    (run / "config.yaml").write_text(as_yaml(again.whole))
    assert start(RESUME).experiment.stages == again.whole.stages


def test_a_stage_that_gets_something_to_do_runs(record, start):
    record(*[word for word in UNPUBLISHED if word != "tracker=none"])
    assert start(RESUME).experiment.stages[-1] == "report"
    again = start("publish=auto", "tracker.register=crowns", RESUME)
    assert again.experiment.stages[-2:] == again.whole.stages[-2:] == ["publish", "register"]
    assert start("publish=auto", "stages=[report]", RESUME).experiment.stages == ["report"]


def test_a_run_that_lies_elsewhere_now_says_so(run, start, tmp_path):
    run.rename(tmp_path / "moved")
    assert start("resume=moved").whole.paths.run == "moved"


def test_of_an_older_record_what_it_lacks_is_as_by_default(run, start):
    old = recorded(run)
    del old["hardware"]["tune_s"], old["launcher"], old["export"]
    (run / "config.yaml").write_text(yaml.safe_dump({**old, "resume": "a run=1"}))
    experiment = start("seed=8", RESUME).experiment
    assert (experiment.seed, experiment.hardware.tune_s, experiment.launcher.jobs) == (8, 0.5, 1)
    assert experiment.export == Experiment().export


@pytest.fixture
def refused(command_line, monkeypatch, tmp_path):
    """A function of words and texts: asserts that these words end in one line with the texts, and no more."""

    def of(words: list[str], *said: str) -> None:
        monkeypatch.setattr(experiment, "run", RUN)
        before = content(tmp_path)
        ended = command_line(*words, RESUME)
        assert ended.code == 1
        assert "\n" not in ended.error
        assert [text for text in ("Error: ", *said) if text not in ended.error] == [], ended.error
        assert content(tmp_path) == before

    return of


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model=yolov5s"], ["model.name=yolov5s instead of yolov5n", "model.size=s instead of n", "more"]),
        (["dataset=trees"], ["dataset.name=trees instead of digits", "dataset.imgsz=320 instead of 64"]),
        (["recipe=dense"], ["recipe.name=dense instead of transfer_quant", "recipe.file=dense.md"]),
        (
            ["model.sparsity=0.5", "dataset.on_corrupt=skip", "recipe.calibration_images=8"],
            [
                "model.sparsity=0.5 instead of 0.4",
                "dataset.on_corrupt=skip instead of fail",
                "recipe.calibration_images=8 instead of 64",
            ],
        ),
        (["recipe.variables.num_epochs=4"], ["recipe.variables.num_epochs=4.0 instead of 2.0"]),
        (["experiment=smoke"], ["recipe.variables.num_epochs=3.0 instead of 2.0"]),  # as the preset has it
        (["experiment=sparsify", "dry_run=true"], ["recipe.name=", "instead of transfer_quant"]),
    ],
)
def test_another_model_data_set_or_recipe_is_refused(run, refused, words, named):
    refused([*words, "seed=8"], "Expected the run", *named, "start a new run without resume=.")


def test_another_content_of_the_recipe_is_refused(record, refused, start, tmp_path):
    own = tmp_path / "own.md"
    own.write_text((CONF_DIRECTORY / "recipe" / "dense.md").read_text())
    words = ["model=yolov5n", "recipe=custom", "recipe.file=own.md"]
    record(*words)
    as_started(tmp_path / "a run=1", start(RESUME))
    own.write_text(own.read_text().replace("final_lr: ", "final_lr: 1"))
    refused([], "another content of own.md")
    refused(words, "another content of own.md")


def test_images_that_cannot_be_used_may_be_left_out_before_the_data_is_read(record, start):
    run = record(*WORDS, finished=())
    again = start("dataset.on_corrupt=skip", RESUME)
    assert changes(run, again) == {"dataset.on_corrupt": ("fail", "skip")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.yaml that can be read"),
        (b"\xff\xfe", "has no config.yaml that can be read"),
        (b"a: [", "The recorded config.yaml cannot be used"),
        (b"unheard: of", "The recorded unheard cannot be used"),
    ],
)
def test_a_run_without_a_readable_record_is_refused(run, refused, content, said):
    (run / "config.yaml").unlink() if content is None else (run / "config.yaml").write_bytes(content)
    refused([], said)


@pytest.fixture
def typed(start):
    """A function of a message: what the command at its end starts, once a shell and Hydra have read it."""

    def of(message: str) -> Start:
        line = message[message.index("python -m sparse_exp ") :].replace("python", "printf '%s\\0'", 1)
        words = (
            subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout.decode().split("\0")
        )
        assert words[:2] == ["-m", "sparse_exp"]
        return start(*words[2:-1])

    return of


TO_EXPORT = ["fetch", "plan", "baseline", "train", "evaluate", "export"]


@pytest.mark.parametrize(
    ("state", "said", "stages"),
    [
        ({"status": "KILLED"}, "to be FINISHED, but got 'KILLED'", [*TO_EXPORT, "verify"]),
        ({"finished": TO_EXPORT[:4], "trained": True}, "evaluate and export", ["evaluate", "export"]),
        ({"finished": TO_EXPORT[:5], "trained": True}, "to have run export", ["export"]),
        ({"finished": TO_EXPORT[:2]}, "evaluate and export", TO_EXPORT),
        ({"finished": TO_EXPORT, "changed": "model.onnx"}, "is missing or not what", [*TO_EXPORT, "verify"]),
    ],
)
def test_a_run_that_cannot_be_published_is_gone_on_with_by_what_is_said(record, typed, state, said, stages):
    run = record(*UNPUBLISHED, "stages=[fetch,plan,baseline,train,evaluate,export,verify]")
    set_state(run, **{"status": "FINISHED", **state})
    with pytest.raises(ConfigError, match=said) as raised:
        publish_run(read_finished(run), run.parent / "zoo")
    again = typed(str(raised.value))
    assert (Path(again.experiment.resume), again.experiment.stages) == (run, stages)
    assert as_yaml(again.whole) == (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("trained", "stages"), [(True, ["export"]), (False, TO_EXPORT)])
def test_a_run_without_exported_files_is_gone_on_with_by_what_is_said(record, typed, trained, stages):
    run = record(*UNPUBLISHED)
    set_state(run, status="KILLED", finished=TO_EXPORT[:4] if trained else (), trained=trained)
    with pytest.raises(ConfigError, match="has no exported model") as raised:
        find_model(str(run), engine="onnxruntime")
    assert typed(str(raised.value)).experiment.stages == stages


def set_state(run: Path, *, status: str, finished=(), trained=False, changed=None) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    stages = {stage: {"fingerprint": stage} for stage in finished}
    if trained:
        stages["train"]["facts"] = {"checkpoint": "weights/best_pruned.pt"}
    if changed:
        stages["export"]["outputs"] = {changed: "0" * 64}
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": status, "stages": stages}))


def test_a_dry_run_changes_nothing(run, command_line, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(experiment, "run", RUN)
    before = content(run)
    ended = command_line(RESUME, "dry_run=true", "seed=8")
    assert ended.code == 0, ended.error
    assert "yolov5n" in ended.output
    assert content(run) == before
