"""Whether a hardware target fits this host, what of it can be measured here, and which recipes suit it.

A target is an option of ``conf/hardware``: `sparse_exp.config.schema.HardwareConfig`. No engine is imported:
whether one is installed is looked up, not tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from sparse_exp.config.imgsz import Imgsz, in_words, plain
from sparse_exp.config.runtimes import RUNTIMES, skips_zeros
from sparse_exp.config.schema import Experiment, HardwareConfig
from sparse_exp.errors import ConfigError, expected
from sparse_exp.hardware import HostFacts, host_facts, usable_physical_cores
from sparse_exp.hardware.deepsparse import find_deepsparse

_ALL_THE_SAME = "Or set hardware.strict=false to measure what can run all the same."
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Mismatch:
    """One way in which a target does not fit.

    Attributes:
        clause: what differs, without advice: for plans, logs, benchmark rows and reports.
        refusal: the same as an error, one line that says what to do.
        refused: whether a run is refused for it where ``hardware.strict`` is true. An engine that is optional
            (`sparse_exp.config.runtimes.Runtime`) is left out instead where it is not installed.
    """

    clause: str
    refusal: str
    refused: bool = True


@dataclass(frozen=True)
class Preference:
    """The recipes that suit a target.

    Attributes:
        recipes: names of options of ``conf/recipe``, best first.
        why: the reason, as the rest of a sentence.
    """

    recipes: tuple[str, ...]
    why: str


_VNNI = Preference(
    ("transfer_quant_vnni", "transfer_quant", "prune_quant"),
    "8-bit dot products (VNNI) make pruned and quantized convolutions the fastest, in batches with zeros in "
    "blocks of 4",
)
_NO_VNNI = Preference(
    ("transfer_quant", "transfer", "prune_quant", "prune"),
    "8 bits gained more than zeros in floating point where it was measured (docs/hardware.md); but without "
    "8-bit dot products (VNNI) some engines sum up in 16 bits, which can saturate: look at the deployed mAP",
)
_NO_ZEROS = Preference(
    ("quant", "transfer_quant", "prune_quant"),
    "its engines compute with 8 bits and skip no zeros then, which only make the compressed file smaller",
)


def compare(
    hardware: HardwareConfig, facts: HostFacts | None = None, imgsz: Imgsz | None = None
) -> list[Mismatch]:
    """Compare a target with a host and with the data.

    Args:
        hardware: the target.
        facts: of the host; None: this host. Cores and installed engines are always those of this host.
        imgsz: image size of the data; None: it is not compared.

    Returns:
        What does not fit: of instruction sets, cores, engines, licences and image size, in this order.
    """
    facts = facts or host_facts()
    return [
        *_missing_isa(hardware, facts),
        *_missing_cores(hardware),
        *_missing_engines(hardware, facts),
        *_missing_licences(hardware),
        *_other_imgsz(hardware, imgsz),
    ]


def mismatches(
    hardware: HardwareConfig, facts: HostFacts | None = None, imgsz: Imgsz | None = None
) -> list[str]:
    """What does not fit, a clause each; see `compare`."""
    return [mismatch.clause for mismatch in compare(hardware, facts, imgsz)]


def fitted(hardware: HardwareConfig, facts: HostFacts | None = None) -> HardwareConfig:
    """The part of a target that can run on this host, which ``hardware.strict=false`` measures.

    Args:
        hardware: the target.
        facts: of the host; None: this host.

    Returns:
        The target without engines that cannot run, and with no more cores than there are.

    Raises:
        ConfigError: no engine is left.
    """
    facts, usable = facts or host_facts(), usable_physical_cores()
    engines = [engine for engine in hardware.engines if unusable(engine, facts, hardware) is None]
    if not engines:
        raise ConfigError([_cannot_run(engine, facts, hardware).refusal for engine in hardware.engines])
    cores = list(dict.fromkeys(min(number, usable) for number in hardware.cores))
    return replace(hardware, engines=engines, cores=cores)


def unusable(engine: str, facts: HostFacts, hardware: HardwareConfig | None = None) -> str | None:
    """Why an engine cannot run, in a few words; None where it can.

    Args:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        facts: of the host.
        hardware: the target, which may name the interpreter of DeepSparse.
    """
    if why := _absence(engine, hardware):
        return why
    missing = _missing_for(engine, facts)
    return f"needs {_and(missing).upper()}" if missing else None


def _absence(engine: str, hardware: HardwareConfig | None) -> str:
    """Why an engine is not installed; empty where it is."""
    if engine == "deepsparse":
        return find_deepsparse(hardware.deepsparse_python if hardware else None).problem
    return "" if find_spec(RUNTIMES[engine].module or engine) else NOT_INSTALLED


def prefers(hardware: HardwareConfig, facts: HostFacts) -> Preference:
    """The recipes that suit a target, and why.

    Args:
        hardware: the target; one that names no recipes gets those that suit the host.
        facts: of the host.
    """
    if "deepsparse" not in hardware.engines or _absence("deepsparse", hardware):
        general = _NO_ZEROS
    else:
        general = _VNNI if "vnni" in (hardware.isa or facts.isa) else _NO_VNNI
    return replace(general, recipes=tuple(hardware.recipes)) if hardware.recipes else general


def advice(hardware: HardwareConfig, recipe: str, facts: HostFacts | None = None) -> list[str]:
    """Warn of what is allowed and probably not meant, a sentence each.

    Args:
        hardware: the target.
        recipe: name of the recipe that is to run.
        facts: of the host; None: this host.
    """
    facts, found = facts or host_facts(), []
    if hardware.recipes and recipe not in hardware.recipes:
        better = prefers(hardware, facts)
        found.append(
            f"recipe={recipe} is not among those that suit hardware={hardware.name}; recipe="
            f"{better.recipes[0]} is the first of them: {better.why}."
        )
    if hardware.isa and "vnni" not in hardware.isa and "vnni" in facts.isa:
        found.append(
            f"hardware={hardware.name} is for CPUs without 8-bit dot products (VNNI), and this one has them: "
            "what is quantized will be faster here than there."
        )
    return [*found, *_unused(hardware)]


def no_speed_by_zeros(hardware: HardwareConfig) -> str:
    """Why a target cannot choose shares of zeros by speed, as one line; empty where it can.

    Args:
        hardware: the target; the times of its first engine count.
    """
    first = next(iter(hardware.engines), "")
    if not first or skips_zeros(first):
        return ""
    skipping = " or ".join(name for name in RUNTIMES if skips_zeros(name))
    do = f"Zeros make it no faster: put {skipping} first in hardware.engines, or take other recipe.shares."
    return expected("the first engine with recipe.shares=speed", "one that skips zeros", first, do)


def fit_to_host(experiment: Experiment) -> tuple[Experiment, tuple[str, ...]]:
    """Compare the hardware target with this host before anything is trained for it.

    Args:
        experiment: the checked configuration. Its target matters only if it verifies or measures.

    Returns:
        The experiment, its target reduced to what can run here, and what does not fit, a clause each.

    Raises:
        ConfigError: something does not fit for which a run is refused, and ``hardware.strict`` is true: every
            such problem is named. Or no engine can run.
    """
    hardware = experiment.hardware
    found = compare(hardware, imgsz=experiment.dataset.imgsz) if measures(experiment) else []
    if not found:
        return experiment, ()
    refusals = [f"{mismatch.refusal} {_ALL_THE_SAME}" for mismatch in found if mismatch.refused]
    if hardware.strict and refusals:
        raise ConfigError(refusals)
    return replace(experiment, hardware=fitted(hardware)), tuple(mismatch.clause for mismatch in found)


def measures(experiment: Experiment) -> bool:
    """Whether a run verifies or measures on the hardware target."""
    return bool({"verify", "benchmark"} & set(experiment.stages))


def mismatch_sentence(target: str, mismatch: Sequence[str]) -> str:
    """The warning that a target is measured although it does not fit the host.

    Args:
        target: its name.
        mismatch: what does not fit, a clause each, at least one.
    """
    return (
        f"hardware={target} does not fit here: {'; '.join(mismatch)}. What can run is measured all the same; "
        "its numbers are not those of the target."
    )


def _unused(hardware: HardwareConfig) -> Iterator[str]:
    """Settings that no scenario of the target uses."""
    if hardware.streams and hardware.scenarios == ["sync"]:
        yield (
            f"hardware.streams={hardware.streams} is not used: sync is one inference after the other. Add "
            "throughput or async to hardware.scenarios."
        )
    if hardware.batch_sizes != [1] and hardware.scenarios == ["async"]:
        yield (
            f"hardware.batch_sizes={hardware.batch_sizes} is not used: async is one image per inference. Add "
            "sync or throughput to hardware.scenarios."
        )


def _missing_isa(hardware: HardwareConfig, facts: HostFacts) -> Iterator[Mismatch]:
    missing = [isa for isa in hardware.isa if isa not in facts.isa]
    if missing:
        has = ", ".join(facts.isa) or "none of the sets that count"
        yield Mismatch(
            f"the CPU lacks {_and(missing)} (it has {has})",
            expected(
                f"the CPU for hardware={hardware.name}",
                f"one with {_and(hardware.isa)}",
                f"{facts.cpu}: {has}",
                "Take hardware=cpu, or run it on another host.",
            ),
        )


def _missing_cores(hardware: HardwareConfig) -> Iterator[Mismatch]:
    usable = usable_physical_cores()
    for number in [number for number in hardware.cores if number > usable]:
        do = "Set hardware.cores=[] to use all there are."
        refusal = expected("hardware.cores", f"at most the {usable} of this host", number, do)
        yield Mismatch(f"{usable} of {number} cores", refusal)


def _missing_engines(hardware: HardwareConfig, facts: HostFacts) -> Iterator[Mismatch]:
    for engine in hardware.engines:
        why = unusable(engine, facts, hardware)
        # Where the target itself asks for the missing instruction set, `_missing_isa` has said so.
        told = not _absence(engine, hardware) and set(_missing_for(engine, facts)) <= set(hardware.isa)
        if why and not told:
            yield _cannot_run(engine, facts, hardware)


def _cannot_run(engine: str, facts: HostFacts, hardware: HardwareConfig) -> Mismatch:
    """The mismatch of an engine for which `unusable` gives a reason."""
    if _absence(engine, hardware) and engine == "deepsparse":
        found = find_deepsparse(hardware.deepsparse_python)
        refusal = expected("the engine deepsparse", "installed", found.problem, found.do)
        do, refused = found.do[:1].lower() + found.do[1:].rstrip("."), hardware.deepsparse_python is not None
        return Mismatch(f"without deepsparse: {found.problem} ({do})", refusal, refused)
    if _absence(engine, hardware):
        do = f"Run: pip install '{RUNTIMES[engine].requirement}', or take it out of hardware.engines."
        refusal = expected(f"the engine {engine}", "installed", "no such package", do)
        optional = RUNTIMES[engine].optional
        how = f" (run: pip install '{RUNTIMES[engine].requirement}')" if optional else ""
        return Mismatch(f"without {engine}: {NOT_INSTALLED}{how}", refusal, refused=not optional)
    do = f"Take {engine} out of hardware.engines."
    refusal = expected(f"the CPU for {engine}", RUNTIMES[engine].cpu, facts.cpu, do)
    missing = _and(_missing_for(engine, facts)).upper()
    return Mismatch(f"without {engine}: the CPU has no {missing}", refusal)


def _missing_for(engine: str, facts: HostFacts) -> list[str]:
    """Instruction sets that an engine needs and the host lacks."""
    return [isa for isa in RUNTIMES[engine].isa if isa not in facts.isa]


def _missing_licences(hardware: HardwareConfig) -> Iterator[Mismatch]:
    if not hardware.production:
        return
    for engine in [engine for engine in hardware.engines if not RUNTIMES[engine].production]:
        licence = RUNTIMES[engine].licence
        yield Mismatch(
            f"{engine} may not be used in production ({licence}: evaluation only)",
            expected(
                f"the engines of hardware={hardware.name}",
                "licensed for use in production",
                f"{engine} ({licence}: evaluation only)",
                f"Take {engine} out of hardware.engines, or set hardware.production=false.",
            ),
        )


def _other_imgsz(hardware: HardwareConfig, imgsz: Imgsz | None) -> Iterator[Mismatch]:
    if imgsz and hardware.imgsz and imgsz != hardware.imgsz:
        wanted, got = in_words(hardware.imgsz), in_words(imgsz)
        do = f"Set dataset.imgsz={wanted}, or hardware.imgsz=null."
        refusal = expected("dataset.imgsz", f"the {wanted} px of hardware={hardware.name}", plain(imgsz), do)
        yield Mismatch(f"{got} px instead of {wanted} px", refusal)


def _and(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
