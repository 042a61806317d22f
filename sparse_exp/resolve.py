"""From a composed Hydra configuration to a checked `Experiment`.

This is the one module besides the command line that knows OmegaConf. Types are checked by
OmegaConf against the schema while Hydra composes; bounds and everything that spans several keys are
checked here, and all problems are reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.config.imgsz import in_words
from sparse_exp.config.places import apply_environment
from sparse_exp.config.plain import CONF_DIRECTORY, as_dict, out_of_bounds, recipe_path
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, SparseExpError, expected, first_line
from sparse_exp.files import expanded
from sparse_exp.hardware.targets import no_speed_by_zeros
from sparse_exp.redaction import secret_problem, without_secrets
from sparse_exp.runs.directory import MANIFEST
from sparse_exp.sources.cache import is_remote
from sparse_exp.sources.start import PARENT, SCRATCH, require_place
from sparse_exp.sources.stub import STUB_PREFIX, parse_stub
from sparse_exp.stages.fingerprint import as_it_was
from sparse_exp.stages.registry import check_stages, wanted_stages

_GONE = ("hardware.max_spread",)  # keys that earlier versions had


def resolve(config: DictConfig) -> Experiment:
    """Check a composed configuration and turn it into plain dataclasses.

    Args:
        config: what Hydra composed, without its ``hydra`` node.

    Returns:
        The experiment, its stages in their natural order.

    Raises:
        ConfigError: listing every problem found.
    """
    missing = sorted(_missing_keys(OmegaConf.to_container(config), ""))
    if missing:
        raise ConfigError([f"{key} has no value. Set it with {key}=VALUE." for key in missing])
    unknown = list(_unknown_keys(config, Experiment, ""))
    if unknown:
        raise ConfigError([f"Unknown key {key}. Remove it; --help lists all keys." for key in unknown])
    experiment = OmegaConf.to_object(config)
    assert isinstance(experiment, Experiment)
    refuse_secrets(as_dict(experiment))
    problems = [*out_of_bounds(experiment, ""), *_cross_checks(experiment)]
    if problems:
        raise ConfigError(problems)
    experiment.stages = wanted_stages(experiment)
    given = {name: value for name, value in experiment.recipe.variables.items() if value is not None}
    experiment.recipe.variables = dict(given)  # the others are as the recipe has or derives them
    return experiment


def refuse_secrets(config: Any) -> None:
    """Refuse addresses with a user, a password or a token: a configuration is written down and shown.

    Args:
        config: nested dicts and lists of plain values.

    Raises:
        ConfigError: naming the keys.
    """
    values = dict(_values(config, ""))
    held = [(key, text) for key, text in values.items() if without_secrets(text) != text]
    if held:
        raise ConfigError([secret_problem(key, text) for key, text in held])


def _values(plain: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """The texts of nested dicts and lists, under their full keys; interpolations are not followed."""
    if isinstance(plain, dict | list):
        for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
            yield from _values(value, f"{prefix}{key}.")
    elif isinstance(plain, str):
        yield prefix.rstrip("."), plain


def read_record(text: str) -> DictConfig:
    """The configuration that a run recorded in its ``config.yaml``; what it does not have has its default.

    A key that came after version 0.1 has the value that says what that version did.

    Keys of earlier versions that only said how to measure are left out.

    How the run was started is no part of it: ``resume`` and ``dry_run`` are off.

    Args:
        text: the file's content.

    Raises:
        ConfigError: it does not fit the schema.
    """
    schema = OmegaConf.structured(Experiment)
    OmegaConf.set_struct(schema.recipe.variables, False)
    try:
        plain = read_yaml(text)
        if not isinstance(plain, dict | None):
            raise ValueError("it is no map of keys")
        _require_plain(plain, "")
        recorded = OmegaConf.create(text)
        for key in _GONE:
            where, _, name = key.rpartition(".")
            if OmegaConf.select(recorded, key) is not None:
                del OmegaConf.select(recorded, where)[name]
        # Places have no default in the schema; those that came after the record are where they are now.
        places = {"paths": OmegaConf.load(CONF_DIRECTORY / "paths" / "default.yaml")}
        config = OmegaConf.merge(schema, as_it_was(), places, recorded, {"resume": None, "dry_run": False})
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        what = getattr(error, "full_key", None) or "config.yaml"
        do = "It was recorded by another version; run it with that one, or change the file."
        raise ConfigError(
            f"The recorded {what} cannot be used: {first_line(error).rstrip('.')}. {do}"
        ) from error
    assert isinstance(config, DictConfig)
    return config


def _require_plain(value: Any, key: str) -> None:
    """Refuse interpolations: a record was written without, and one from elsewhere must not read what is here.

    Raises:
        ValueError: names the key.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_plain(str(name), key)
            _require_plain(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple | set):
        for inner in value:
            _require_plain(inner, key)
    elif isinstance(value, str) and "${" in value:
        raise ValueError(f"{key or 'a key'} holds an interpolation, {value[:40]!r}")


def rebuild(text: str, overrides: Sequence[str]) -> tuple[Experiment, list[str]]:
    """The experiment that a run recorded in its ``config.yaml``, with some values changed.

    Args:
        text: the file's content.
        overrides: ``key=value`` each; groups cannot be chosen anew, for their values are already in it.

    Returns:
        The checked experiment, and the keys that the record does not have, which got their defaults.

    Raises:
        ConfigError: the record or an override does not fit the schema, or `resolve` finds a problem.
    """
    config = read_record(text)
    for word in overrides:
        config = _with_value(config, word)
    apply_environment(config, overrides)
    known = {*_keys(OmegaConf.to_container(OmegaConf.create(text)), "")}
    whole = {key.rpartition(".")[0] for key in known}  # a value by default may be a mapping in the record
    filled = set(_keys(OmegaConf.to_container(OmegaConf.structured(Experiment)), "")) - known - whole
    return resolve(config), sorted(filled)


def _with_value(config: Any, word: str) -> Any:
    """A composed configuration with one of its values set.

    Raises:
        ConfigError: the word is no ``key=value``, names no value, or one of another type.
    """
    key, sign, _ = word.partition("=")
    if not sign or not key:
        raise ConfigError(expected("an override", "KEY=VALUE", word, "Set single values, such as seed=1."))
    try:
        if isinstance(OmegaConf.select(config, key), DictConfig) and key != "recipe.variables":
            do = f"To choose another option of {key}, start a new run with python -m sparse_exp."
            raise ConfigError(expected("an override", "a single value", word, do))
        return OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        do = "Correct it; python -m sparse_exp --help lists all keys."
        raise ConfigError(
            f"The override {word} cannot be used: {first_line(error).rstrip('.')}. {do}"
        ) from error


def _keys(plain: Any, prefix: str) -> list[str]:
    """Dotted keys of nested dicts down to their values."""
    if not isinstance(plain, dict) or not plain:
        return [prefix.rstrip(".")]
    return [key for name, value in plain.items() for key in _keys(value, f"{prefix}{name}.")]


def _missing_keys(plain: Any, prefix: str) -> Iterator[str]:
    """Keys without a value; interpolations of them are not followed, as OmegaConf would."""
    children = (
        plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    )
    if plain == "???":
        yield prefix.rstrip(".")
    for key, value in children:
        yield from _missing_keys(value, f"{prefix}{key}.")


def _unknown_keys(config: DictConfig, schema: type, prefix: str) -> Iterator[str]:
    """Keys that were forced in with Hydra's ``+``; no code would ever read them."""
    types = get_type_hints(schema)
    for key in map(str, config):
        if key not in types:
            yield f"{prefix}{key}"
        elif is_dataclass(types[key]) and isinstance(config[key], DictConfig):
            yield from _unknown_keys(config[key], types[key], f"{prefix}{key}.")


def _cross_checks(experiment: Experiment) -> Iterator[str]:
    yield from _check_dataset(experiment)
    yield from _check_files(experiment)
    yield from _check_recipe(experiment)
    yield from _check_shares(experiment)
    yield from _check_devices(experiment)
    yield from check_stages(experiment)
    yield from _check_hardware(experiment)


def _check_hardware(experiment: Experiment) -> Iterator[str]:
    hardware = experiment.hardware
    examples = {
        "batch_sizes": "[1]",
        "engines": "[onnxruntime]",
        "variants": "[sparse]",
        "scenarios": "[sync]",
    }
    for key, example in examples.items():
        if not getattr(hardware, key):
            yield expected(f"hardware.{key}", "at least one", [], f"For example {example}.")
    for key in ("engines", "variants", "scenarios", "batch_sizes", "cores", "streams"):
        values = getattr(hardware, key)
        if len(set(values)) < len(values):
            yield expected(f"hardware.{key}", "different values", values, "Name each once.")
    if hardware.max_warmup_s < hardware.warmup_s:
        do = f"Set hardware.max_warmup_s={hardware.warmup_s:g} or more."
        yield expected(
            "hardware.max_warmup_s",
            f"at least hardware.warmup_s={hardware.warmup_s:g}",
            hardware.max_warmup_s,
            do,
        )


def _check_dataset(experiment: Experiment) -> Iterator[str]:
    dataset = experiment.dataset
    transpose = experiment.trainer.augment.transpose
    if transpose and isinstance(dataset.imgsz, tuple):
        do = "The axes of a rectangle cannot be swapped; set it to 0, or dataset.imgsz to one number."
        should_be = f"0 with dataset.imgsz={in_words(dataset.imgsz)}"
        yield expected("trainer.augment.transpose", should_be, transpose, do)
    if dataset.path is None and dataset.generator is None:
        yield "dataset.path has no value. Give the data yaml with dataset.path=PATH, or use dataset=trees."
    if dataset.path is not None and not expanded(dataset.path).is_file():
        do = "Give the path of a data yaml in Ultralytics format."
        yield expected("dataset.path", "an existing file", dataset.path, do)


def _check_files(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    if model.stub is not None:
        yield from _problem(parse_stub, model.stub)
    if model.weights not in (None, SCRATCH):
        yield from _problem(require_place, "model.weights", model.weights, "'scratch'")
    for source in (*model.sources, *model.grow_from):
        if is_remote(source.uri):  # a file that is not there is no error: others may serve
            yield from _problem(require_place, "model.sources", source.uri, "a path")
    if experiment.checkpoint and not expanded(experiment.checkpoint).is_file():
        do = "Give a checkpoint that a run wrote, such as outputs/runs/DATE/TIME-NAME/weights/last.pt."
        yield expected("checkpoint", "an existing file", experiment.checkpoint, do)
    if experiment.resume and not (Path(experiment.resume) / MANIFEST).is_file():
        do = "Give a directory below outputs/runs."
        yield expected("resume", f"the directory of a run with its {MANIFEST}", experiment.resume, do)


def _check_recipe(experiment: Experiment) -> Iterator[str]:
    recipe = experiment.recipe
    for name, value in recipe.variables.items():
        if value is not None and not math.isfinite(value):
            yield expected(f"recipe.variables.{name}", "a finite number", value, f"Change {name}.")
    if recipe.file.startswith(STUB_PREFIX):
        yield from _problem(parse_stub, recipe.file)
    elif not recipe_path(recipe.file).is_file():
        shipped = CONF_DIRECTORY / "recipe"
        names = sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*.md"))
        do = f"Give a path, a SparseZoo stub, or one of those shipped: {', '.join(names)}."
        yield expected("recipe.file", "an existing file", recipe.file, do)
    shares = experiment.model.layer_sparsity
    if len(shares) != 4 or not all(0 <= share <= 0.99 for share in shares):
        do = "Change model.layer_sparsity, for example to [0.4,0.5,0.65,0.75]."
        yield expected("model.layer_sparsity", "four shares of at least 0 and at most 0.99", shares, do)
    yield from _check_teacher(experiment)
    if recipe.oneshot and recipe.channels is not None:
        yield (
            "recipe.oneshot=true trains nothing, and a network must be trained when channels are gone. Leave "
            "out recipe.channels, or set recipe.oneshot=false."
        )
    if recipe.oneshot and recipe.num_epochs is not None:
        yield "recipe.oneshot=true trains nothing. Leave out recipe.num_epochs, or set recipe.oneshot=false."


def _check_shares(experiment: Experiment) -> Iterator[str]:
    model, by_speed = experiment.model, experiment.recipe.shares == "speed"
    if model.speedup is not None and model.macs is not None:
        yield "model.speedup and model.macs both say how much is pruned. Leave one of them out."
    if by_speed and model.speedup is None:
        yield "recipe.shares=speed needs a speed-up: add for example model.speedup=1.5."
    if model.speedup is not None and not by_speed:
        yield f"model.speedup={model.speedup:g} is for shares by measured times. Add recipe.shares=speed."
    if by_speed and (refusal := no_speed_by_zeros(experiment.hardware)):
        yield refusal


def _check_devices(experiment: Experiment) -> Iterator[str]:
    trainer = experiment.trainer
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", trainer.device):
        do = "For example trainer.device=cuda:1."
        yield expected("trainer.device", "auto, cpu, cuda or cuda:NUMBER", trainer.device, do)
    elif trainer.device.startswith("cuda:") and trainer.devices > 1:
        do = "Each process has a GPU of its own: set trainer.device=cuda, or trainer.devices=1."
        yield expected("trainer.device", f"cuda with trainer.devices={trainer.devices}", trainer.device, do)
    if isinstance(trainer.batch_size, int) and trainer.batch_size % trainer.devices:
        do = "Each process takes an equal share of a batch; change one of them."
        yield expected(
            "trainer.batch_size", f"a multiple of trainer.devices={trainer.devices}", trainer.batch_size, do
        )
    if experiment.recipe.oneshot and trainer.devices > 1:
        yield "recipe.oneshot=true trains nothing. Leave out trainer.devices, or set recipe.oneshot=false."


def _check_teacher(experiment: Experiment) -> Iterator[str]:
    teacher, baseline = experiment.recipe.teacher, experiment.recovery.baseline
    if teacher and experiment.recipe.oneshot:
        yield "recipe.oneshot=true trains nothing. Leave out recipe.teacher, or set recipe.oneshot=false."
    if teacher == "baseline" and baseline == "none":
        do = "Add recovery.baseline=auto, or give a checkpoint with recipe.teacher=PATH."
        yield f"recipe.teacher=baseline needs the dense counterpart, but recovery.baseline is 'none'. {do}"
    elif teacher not in (None, "self", "baseline", PARENT):
        yield from _problem(require_place, "recipe.teacher", teacher, "'self', 'baseline' or 'parent'")
    if baseline not in ("none", "auto") and not (expanded(baseline) / MANIFEST).is_file():
        do = "Set recovery.baseline to auto or none, or give the directory of a dense run."
        yield expected("recovery.baseline", f"the directory of a run with its {MANIFEST}", baseline, do)


def _problem(check: Callable[..., Any], *arguments: Any) -> Iterator[str]:
    """What a check says against its arguments."""
    try:
        check(*arguments)
    except SparseExpError as error:
        yield str(error)
