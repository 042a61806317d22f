from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_exp.config.plain import as_dict, as_yaml, recipe_path
from sparse_exp.config.schema import STAGES, Experiment, SourceConfig
from sparse_exp.errors import ConfigError
from sparse_exp.resolve import resolve

# The least that a run needs, without any file.
LEAST = {
    "name": "least",
    "model": {"name": "yolov5n", "size": "n", "weights": "scratch"},
    "dataset": {"name": "digits", "generator": "digits", "imgsz": 96},
    "recipe": {"name": "dense", "file": "dense.md"},
    "hardware": {"name": "cpu"},
    "paths": {"run": "run", "mlflow": "mlflow", "zoo": "zoo"},
}


def config_of(**changes):
    """The least configuration with values at dotted keys (``__`` for a dot)."""
    config = OmegaConf.merge(OmegaConf.structured(Experiment), LEAST)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def problems(**changes) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        resolve(config_of(**changes))
    assert all("\n" not in problem and problem.endswith(".") for problem in raised.value.problems)
    return raised.value.problems


def test_what_is_right_becomes_plain_dataclasses():
    experiment = resolve(config_of(trainer__batch_size=4))
    assert type(experiment) is Experiment
    assert experiment.trainer.batch_size == 4
    assert type(experiment.hardware.engines) is list


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer__batch_size", 1),
        ("trainer__batch_size", 1024),
        ("trainer__lr", 1.0),
        ("trainer__lr", 1e-12),
        ("seed", 0),
        ("seed", 2**31 - 1),
        ("trainer__augment__scale", 0.9),
        ("hardware__cores", []),
        ("hardware__repeats", 1000),
        ("dataset__imgsz", 64),
        ("dataset__imgsz", 2048),
    ],
)
def test_bounds_belong_to_the_range(key, value):
    resolve(config_of(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "range_"),
    [
        ("trainer__batch_size", 0, "at least 1 and at most 1024 images"),
        ("trainer__batch_size", 1025, "at least 1 and at most 1024 images"),
        ("trainer__lr", 0.0, "above 0.0 and at most 1.0"),
        ("trainer__lr", float("nan"), "above 0.0 and at most 1.0"),
        ("trainer__lr", float("inf"), "above 0.0 and at most 1.0"),
        ("seed", -1, "at least 0 and at most 2147483647"),
        ("trainer__augment__scale", 0.91, "at least 0.0 and at most 0.9"),
        ("hardware__repeats", 0, "at least 1 and at most 1000"),
    ],
)
def test_beyond_the_bounds(key, value, range_):
    name = key.replace("__", ".")
    assert problems(**{key: value}) == [f"Expected {name} to be {range_}, but got {value!r}. Change {name}."]


def test_choices():
    assert problems(model__size="q") == [
        "Expected model.size to be one of n, s, m, l, x, but got 'q'. Set model.size to one of them."
    ]
    (problem,) = problems(hardware__engines=["onnxruntime", "tensorrt"])
    assert "deepsparse, onnxruntime, openvino, mnn, torch, but got 'tensorrt'" in problem


def test_all_problems_are_named_at_once():
    found = problems(
        seed=-1,
        model__size="q",
        dataset__imgsz=100,
        stages=["export"],
        hardware__batch_sizes=[0],
        checkpoint="nowhere.pt",
        recipe__file="nowhere.md",
        recipe__variables={"num_epochs": float("nan")},
        resume="nowhere",
    )
    keys = (
        "seed",
        "model.size",
        "dataset.imgsz",
        "hardware.batch_sizes",
        "checkpoint",
        "recipe.file",
        "recipe.variables.num_epochs",
        "resume",
    )
    for key in keys:
        assert sum(problem.startswith(f"Expected {key} to be ") for problem in found) == 1, key
    assert len(found) == len(keys)  # export has its checkpoint: that it is missing is said once


@pytest.mark.parametrize(("imgsz", "nearest"), [(100, 96), (65, 64), (321, 320), (340, 352)])
def test_imgsz_is_a_multiple_of_the_stride(imgsz, nearest):
    (problem,) = problems(dataset__imgsz=imgsz)
    assert f"dataset.imgsz={nearest}." in problem
    assert nearest % 32 == 0


def test_values_that_are_missing_are_named_and_nothing_else():
    config = config_of()
    config.model.name = "???"
    config.model.sources = [SourceConfig(sha256="00")]
    config.name = "${model.name}-run"
    with pytest.raises(ConfigError) as raised:
        resolve(config)
    assert raised.value.problems == [
        "model.name has no value. Set it with model.name=VALUE.",
        "model.sources.0.uri has no value. Set it with model.sources.0.uri=VALUE.",
    ]


def test_keys_that_were_forced_in_are_refused():
    config = config_of()
    OmegaConf.set_struct(config, False)
    plain = OmegaConf.merge(OmegaConf.to_container(config), {"foo": 1, "trainer": {"augment": {"bar": 2}}})
    with pytest.raises(ConfigError) as raised:
        resolve(plain)
    assert raised.value.problems == [
        "Unknown key trainer.augment.bar. Remove it; --help lists all keys.",
        "Unknown key foo. Remove it; --help lists all keys.",
    ]


def test_recipe_variables_may_have_any_name():
    variables = {"my_own": 1.5}
    assert resolve(config_of(recipe__variables=variables)).recipe.variables == variables


def test_variables_without_a_value_are_left_to_the_recipe():
    variables = {"num_epochs": 3.0, "warmup_epochs": None}
    assert resolve(config_of(recipe__variables=variables)).recipe.variables == {"num_epochs": 3.0}


@pytest.mark.parametrize(
    "teacher",
    [
        "self",
        "baseline",
        "https://x.org/t.pt",
        "zoo:cv/detection/yolov5-s/pytorch/ultralytics/coco/base-none",
    ],
)
def test_teachers_that_are_no_files(teacher):
    experiment = resolve(config_of(recipe__teacher=teacher, recovery__baseline="auto"))
    assert experiment.recipe.teacher == teacher


def test_a_baseline_may_be_the_directory_of_a_run(tmp_path):
    (tmp_path / "manifest.json").touch()
    assert resolve(config_of(recovery__baseline=str(tmp_path), recipe__teacher="baseline"))


def test_a_published_recipe_lies_in_its_folder():
    assert recipe_path("published/transfer_pruned.md").is_file()


def test_wrong_types_never_get_this_far():
    with pytest.raises(OmegaConfBaseException, match="could not be converted to Integer"):
        config_of(trainer__val_batch_size="abc")


def test_stages_come_in_the_order_of_the_plan():
    experiment = resolve(config_of(stages=["train", "fetch", "plan"]))
    assert experiment.stages == ["fetch", "plan", "train"]


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"stages": []}, ["stages", "fetch, plan"]),
        ({"stages": ["export"]}, ["export needs a trained checkpoint", "checkpoint=PATH"]),
        ({"stages": ["evaluate", "fetch"]}, ["evaluate needs a trained checkpoint"]),
        ({"stages": ["fetch", "plan", "train", "verify"]}, ["verify needs exported files", "resume=RUN"]),
        ({"stages": ["benchmark"]}, ["benchmark needs exported files", "export"]),
        ({"dataset__generator": None}, ["dataset.path has no value", "dataset.path=PATH"]),
        ({"dataset__path": "/nowhere/data.yaml"}, ["dataset.path", "'/nowhere/data.yaml'", "Ultralytics"]),
        ({"model__weights": "nowhere.pt"}, ["model.weights", "'nowhere.pt'"]),
        ({"recipe__file": "nowhere.md"}, ["recipe.file", "transfer_quant.md"]),
        ({"recipe__file": "zoo:nowhere"}, ["the SparseZoo stub", "'zoo:nowhere'"]),
        (
            {"recipe__teacher": "nowhere.pt"},
            ["recipe.teacher", "'nowhere.pt'", "'self', 'baseline' or 'parent'"],
        ),
        ({"recipe__teacher": "zoo:x"}, ["the SparseZoo stub", "'zoo:x'"]),
        ({"recipe__teacher": "baseline"}, ["recovery.baseline is 'none'", "recovery.baseline=auto"]),
        ({"recovery__baseline": "nowhere"}, ["recovery.baseline", "manifest.json", "auto or none"]),
        ({"recipe__oneshot": True, "recipe__num_epochs": 2.0}, ["trains nothing", "recipe.num_epochs"]),
        ({"recipe__oneshot": True, "recipe__teacher": "self"}, ["trains nothing", "recipe.teacher"]),
        ({"trainer__devices": 3}, ["trainer.batch_size", "a multiple of trainer.devices=3", "but got 4"]),
        ({"recipe__oneshot": True, "trainer__devices": 2}, ["trains nothing", "trainer.devices"]),
        ({"recipe__num_epochs": 0.0}, ["recipe.num_epochs", "above 0.0"]),
        ({"recipe__optimizer": "adam"}, ["recipe.optimizer", "adamw, sgd"]),
        ({"recipe__pattern": "block8"}, ["recipe.pattern", "unstructured, block4"]),
        ({"model__layer_sparsity": [0.5, 0.5, 0.5]}, ["model.layer_sparsity", "four shares"]),
        ({"model__layer_sparsity": [0.5, 0.5, 0.5, 1.0]}, ["model.layer_sparsity", "at most 0.99"]),
        ({"model__speedup": 1.5}, ["model.speedup=1.5", "Add recipe.shares=speed"]),
        (
            {"recipe__shares": "speed", "hardware__engines": ["mnn"]},
            ["recipe.shares=speed needs a speed-up", "model.speedup=1.5"],
        ),
        (
            {
                "recipe__shares": "speed",
                "model__speedup": 1.5,
                "model__macs": 0.5,
                "hardware__engines": ["mnn"],
            },
            ["model.speedup and model.macs", "Leave one of them out"],
        ),
        (
            {
                "recipe__shares": "speed",
                "model__speedup": 1.5,
                "hardware__engines": ["openvino", "mnn"],
            },
            ["one that skips zeros, but got 'openvino'", "put deepsparse or mnn first in hardware.engines"],
        ),
        ({"hardware__engines": []}, ["hardware.engines", "at least one"]),
        ({"hardware__batch_sizes": []}, ["hardware.batch_sizes", "at least one"]),
        ({"hardware__batch_sizes": [1, -4]}, ["hardware.batch_sizes", "at least 1", "images each", "-4"]),
        ({"hardware__batch_sizes": [1, 10**8]}, ["hardware.batch_sizes", "at most 1024", "100000000"]),
        ({"hardware__cores": [2, 0]}, ["hardware.cores", "at least 1 and at most 1024 each", "got 0"]),
        ({"hardware__streams": [4096]}, ["hardware.streams", "at most 1024 each", "4096"]),
        ({"hardware__engines": ["torch", "torch"]}, ["hardware.engines", "different values"]),
        ({"hardware__batch_sizes": [4, 1, 4]}, ["hardware.batch_sizes", "Name each once"]),
        ({"hardware__imgsz": 100}, ["hardware.imgsz", "a multiple of 32"]),
        ({"hardware__warmup_s": 20.0}, ["hardware.max_warmup_s", "hardware.warmup_s=20", "but got 10.0"]),
        ({"resume": "nowhere"}, ["resume", "manifest.json", "outputs/runs"]),
    ],
)
def test_checks_across_keys(changes, fragments):
    (problem,) = problems(**changes)
    for fragment in fragments:
        assert fragment in problem


def test_a_checkpoint_is_for_runs_without_training(tmp_path):
    path = tmp_path / "last.pt"
    path.touch()
    (problem,) = problems(checkpoint=str(path))
    assert "model.weights=PATH" in problem
    assert resolve(config_of(checkpoint=str(path), stages=["export", "benchmark"])).checkpoint == str(path)


def test_a_recipe_is_found_by_path_or_beside_its_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("dense.md").parent.name == "recipe"
    (tmp_path / "dense.md").touch()
    assert recipe_path("dense.md").resolve() == (tmp_path / "dense.md").resolve()  # one's own wins


def test_as_dict_and_as_yaml_hold_the_whole_configuration():
    experiment = resolve(config_of(seed=7))
    plain = as_dict(experiment)
    assert plain["seed"] == 7
    assert plain["trainer"]["augment"]["hue"] == 0.02
    assert plain == OmegaConf.to_container(OmegaConf.create(as_yaml(experiment)))


@pytest.fixture
def zoo(tmp_path):
    """A local zoo that holds one model."""
    (tmp_path / "zoo/cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned75-none").mkdir(parents=True)
    return str(tmp_path / "zoo")


TAKEN = "zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/pruned75-none"


def test_a_stub_to_publish_under_is_checked_before_anything_runs(zoo):
    assert resolve(config_of(paths__zoo=zoo, publish="auto")).publish == "auto"
    assert resolve(config_of(paths__zoo=zoo, publish=TAKEN.replace("75", "76"))).publish
    for overwrite in (False, True):  # which is about the run's directory
        (taken,) = problems(paths__zoo=zoo, publish=TAKEN, overwrite=overwrite)
        assert taken.startswith(f"{TAKEN} is published already in {zoo}.")
    (short,) = problems(paths__zoo=zoo, publish="zoo:yolov5-n-digits-pruned75")  # means the same
    assert "is published already" in short
    (malformed,) = problems(paths__zoo=zoo, publish="zoo:mine")
    assert "to be zoo:DOMAIN/" in malformed
    (outside,) = problems(paths__zoo=zoo, publish="zoo:cv/../yolov5-n/pytorch/sparse_exp/digits/base-none")
    assert outside.startswith("Expected the stub to publish under to be")


def test_what_is_to_be_published_must_be_made(zoo):
    (problem,) = problems(paths__zoo=zoo, publish="auto", stages=["fetch", "plan", "train", "publish"])
    assert problem == "publish=auto needs the stage evaluate. Add it to stages, or set publish=null."
    (alone,) = problems(stages=["publish"])
    assert alone.startswith("stages=[publish] needs a stub")


def test_a_zoo_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("no directory")
    (problem,) = problems(paths__zoo=str(tmp_path / "file/zoo"), publish="auto")
    assert problem.startswith("Expected the local zoo to be a directory that you can write, but got ")


def test_without_a_stub_there_is_no_stage_that_publishes():
    assert resolve(config_of()).stages == [stage for stage in STAGES if stage not in ("publish", "register")]
    assert resolve(config_of(publish="auto")).stages == [stage for stage in STAGES if stage != "register"]


def test_a_model_to_register_is_checked_before_anything_runs():
    assert resolve(config_of(tracker__register="crowns", tracker__alias="candidate")).stages[-1] == "register"
    assert "register" not in resolve(config_of()).stages
    (alone,) = problems(tracker__alias="candidate")
    assert "tracker.register=NAME" in alone
    for name in ("", "a/b", "a:b", "..", "with space", "x" * 300):
        (problem,) = problems(tracker__register=name)
        assert problem.startswith("Expected tracker.register to be letters"), name
    for alias in ("", "latest", "Latest", "v1", "a.b", "x" * 300):
        (problem,) = problems(tracker__register="crowns", tracker__alias=alias)
        assert problem.startswith("Expected tracker.alias to be letters"), alias
    (nowhere,) = problems(tracker__register="crowns", tracker__backend="none")
    assert nowhere.startswith("tracker.register=crowns needs MLflow")


def test_what_is_to_be_registered_must_be_exported_and_verified():
    (problem,) = problems(tracker__register="crowns", stages=["fetch", "plan", "train", "register"])
    assert problem.startswith("tracker.register=crowns needs the stage export.")
    (problem,) = problems(tracker__register="crowns", stages=["fetch", "plan", "train", "export", "register"])
    assert problem.startswith("tracker.register=crowns needs the stage verify.")
    (alone,) = problems(stages=["register"])
    assert alone.startswith("stages=[register] needs a name")


@pytest.mark.parametrize("name", ["crowns", "v2.1_trees-x"])
def test_mlflow_takes_the_names_that_are_taken_here(name):
    from mlflow.utils.validation import _validate_model_alias_name_reserved, _validate_model_name

    assert resolve(config_of(tracker__register=name)).tracker.register == name
    _validate_model_name(name)
    _validate_model_alias_name_reserved("candidate")
