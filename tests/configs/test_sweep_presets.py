"""The presets of sweeps and launchers: each composes, and each of the jobs that it may launch can run."""

from __future__ import annotations

import itertools

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hydra_plugins.sparse_exp_search._space import parse_space
from sparse_exp.config.places import register_schema
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import SIZES, Experiment
from sparse_exp.planning.rules import length_is_open
from sparse_exp.resolve import resolve
from sparse_exp.stages.names import resolve_objective

PRESETS = sorted(path.stem for path in (CONF_DIRECTORY / "sweep").glob("*.yaml"))
LAUNCHERS = {"serial": "basic", "joblib": "joblib", "ray": "ray", "slurm": "submitit_slurm"}
TARGET = "hydra_plugins.sparse_exp_search.search_sweeper.SearchSweeper"


def composed(*words: str, hydra: bool = False):
    register_schema()
    with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
        return compose("config", list(words), return_hydra_config=hydra)


def params_of(preset: str) -> list[str]:
    params = composed(f"sweep={preset}", hydra=True).hydra.sweeper.params
    return [f"{key}={value}" for key, value in params.items()]


def grid_of(*words: str) -> list[list[str]]:
    """The jobs that Hydra's own sweeper launches."""
    overrides = OverridesParser.create().parse_overrides(list(words))
    return BasicSweeper.split_arguments(overrides, None)[0]


def test_which_there_are():
    assert PRESETS == ["grid_sizes", "pareto", "ship", "sparsity_ladder"]
    assert {path.stem for path in (CONF_DIRECTORY / "launcher").glob("*.yaml")} == set(LAUNCHERS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_corner_of_a_preset_is_an_experiment_with_its_objectives(preset):
    names = set()
    for words in parse_space([f"sweep={preset}", *params_of(preset)], None).corners():
        experiment = resolve(composed(*words))
        assert isinstance(experiment, Experiment)
        full = [resolve_objective(name, experiment) for name in experiment.sweep.objectives]
        assert len(full) == 2
        names.add(experiment.name)
    assert len(names) > 1  # else the jobs could not be told apart


def test_the_grid_of_sizes():
    jobs = grid_of(*params_of("grid_sizes"))
    recipes = ("dense", "transfer", "transfer_quant")
    expected = itertools.product([f"model=yolov5{size}" for size in SIZES], [f"recipe={r}" for r in recipes])
    assert sorted(map(sorted, jobs)) == sorted(map(list, expected))


def test_the_ladder_of_sparsities():
    found = [
        resolve(composed("sweep=sparsity_ladder", *words)) for words in grid_of(*params_of("sparsity_ladder"))
    ]
    assert [experiment.model.sparsity for experiment in found] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert {experiment.recipe.name for experiment in found} == {"transfer_quant"}
    assert found[0].name == "yolov5s-trees-transfer_quant-0.5"


@pytest.mark.parametrize(("words", "target"), [([], "production"), (["hardware=all"], "all")])
def test_what_is_weighed_to_be_shipped(words, target):
    jobs = grid_of(*params_of("ship"))
    found = [resolve(composed("sweep=ship", *words, *job)) for job in jobs]
    assert {job.hardware.name for job in found} == {target}
    assert {"dense", "dense_int8", "sparse"} <= set(found[0].hardware.variants)
    kinds = [(job.recipe.name, job.recipe.pattern, job.recipe.channels) for job in found]
    assert kinds[:3] == [
        ("quant", "unstructured", None),
        ("transfer_quant", "unstructured", None),
        ("transfer_quant_vnni", "block4", None),
    ]
    assert {name: share for name, _, share in kinds[3:]} == {
        "slim_quant_70": 0.7, "slim_quant": 0.5, "slim_quant_30": 0.3,
    }  # fmt: skip
    for job in found:  # all have the same dense counterpart, which is trained once
        assert job.recovery.baseline == "auto"
        assert length_is_open(job)
        assert job.model.most_epochs == 12
        assert job.sweep.max_loss == 0.01
        assert job.recipe.channels is None or job.recipe.variables["channels"] == job.recipe.channels


def test_the_command_line_replaces_and_extends_what_a_preset_varies():
    jobs = grid_of(*params_of("grid_sizes"), "model=yolov5n", "seed=0,1")
    assert len(jobs) == 3 * 2
    assert all("model=yolov5n" in words for words in jobs)
    words = ["sweep=pareto", *params_of("pareto"), "recipe=dense", "model.sparsity=0.5,0.6", "seed=0,1"]
    space = parse_space(words, None)
    assert list(space.axes) == ["model", "recipe.pattern", "model.sparsity", "dataset.imgsz", "seed"]
    assert "recipe=dense" in space.fixed
    assert space.size == 2 * 2 * 2 * 3 * 2


def test_who_sweeps():
    assert composed("sweep=pareto", hydra=True).hydra.sweeper._target_ == TARGET
    for words in ([], ["sweep=grid_sizes"], ["sweep=ship"], ["sweep=sparsity_ladder"]):
        assert composed(*words, hydra=True).hydra.sweeper._target_.endswith("BasicSweeper")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher):
    config = composed(f"launcher={launcher}", "launcher.jobs=7", "ray.address=host:1", "hydra.job.num=0",
                      "hydra.job.id=0", hydra=True)  # fmt: skip
    assert config.hydra.runtime.choices["hydra/launcher"] == LAUNCHERS[launcher]
    assert (config.launcher.name, config.launcher.jobs) == (launcher, 7)
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    at_once = {"joblib": "n_jobs", "slurm": "array_parallelism"}.get(launcher)
    assert at_once is None or config.hydra.launcher[at_once] == 7
    assert launcher != "ray" or config.hydra.launcher.ray.init.address == "host:1"
    assert launcher != "slurm" or settings["submitit_folder"].startswith("${hydra.sweep.dir}/")


def test_the_default_is_serial():
    config = composed(hydra=True)
    assert config.hydra.runtime.choices["hydra/launcher"] == "basic"
    assert (config.launcher.name, config.launcher.jobs) == ("serial", 1)
    assert composed("launcher=joblib").launcher.jobs == 2
