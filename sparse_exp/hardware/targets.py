"""Hardware targets against this host: what does not fit, what is measured all the same, which recipes suit.

A target is an option of ``conf/hardware``: `sparse_exp.config.schema.HardwareConfig`. Nothing heavy is
imported, and no engine: whether one is installed is looked up, not tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MappingProxyType

from sparse_exp.config.schema import Experiment, HardwareConfig
from sparse_exp.errors import ConfigError, expected
from sparse_exp.hardware import HostFacts, host_facts, usable_physical_cores

ALL_THE_SAME = "Or set hardware.strict=false to measure what can run all the same."


@dataclass(frozen=True)
class Runtime:
    """What must be known of an inference engine before it is imported.

    Attributes:
        requirement: what to install, as pip takes it.
        licence: under which it may be used.
        production: whether that allows use in production.
    """

    requirement: str
    licence: str
    production: bool = True


RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        "deepsparse": Runtime("deepsparse==1.8.0", "Neural Magic community", production=False),
        "onnxruntime": Runtime("onnxruntime>=1.17", "MIT"),
        "openvino": Runtime("openvino>=2025.0", "Apache-2.0"),
        "torch": Runtime("torch>=2.5", "BSD-3-Clause"),
    }
)


@dataclass(frozen=True)
class Mismatch:
    """One way in which a target does not fit.

    Attributes:
        said: what differs, without a verb of advice: for plans, logs, benchmark rows and reports.
        refusal: one line that says what to do.
    """

    said: str
    refusal: str


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
    "its engines compute with 8 bits and do not skip zeros, which only make the compressed file smaller",
)


def compare(
    hardware: HardwareConfig, facts: HostFacts | None = None, imgsz: int | None = None
) -> list[Mismatch]:
    """What keeps a target from being measured as it is meant.

    Args:
        hardware: the target.
        facts: of the host; None: of this one. Cores and installed engines are always this one's.
        imgsz: image size of the data in pixels; None: not compared.

    Returns:
        The mismatches of instruction sets, cores, engines, licences and image size, in this order.
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
    hardware: HardwareConfig, facts: HostFacts | None = None, imgsz: int | None = None
) -> list[str]:
    """What differs, a clause each; see `compare`."""
    return [mismatch.said for mismatch in compare(hardware, facts, imgsz)]


def fitted(hardware: HardwareConfig, facts: HostFacts | None = None) -> HardwareConfig:
    """The part of a target that can run on this host: what ``hardware.strict=false`` measures.

    Args:
        hardware: the target.
        facts: of the host; None: of this one.

    Returns:
        It without the engines that cannot run, and with no more cores than there are.

    Raises:
        ConfigError: no engine is left.
    """
    facts, usable = facts or host_facts(), usable_physical_cores()
    engines = [engine for engine in hardware.engines if unusable(engine, facts) is None]
    if not engines:
        raise ConfigError([_cannot_run(engine, facts).refusal for engine in hardware.engines])
    cores = list(dict.fromkeys(min(number, usable) for number in hardware.cores))
    return replace(hardware, engines=engines, cores=cores)


def unusable(engine: str, facts: HostFacts) -> str | None:
    """Why an engine cannot run at all, in a few words; None where it can.

    Args:
        engine: one of `sparse_exp.config.schema.ENGINES`.
        facts: of the host.
    """
    if find_spec(engine) is None:
        return "not installed"
    if engine == "deepsparse" and "avx2" not in facts.isa:
        return "needs AVX2"
    return None


def prefers(hardware: HardwareConfig, facts: HostFacts) -> Preference:
    """The recipes that suit a target, and why.

    Args:
        hardware: the target; one that names no recipes gets those that suit the host.
        facts: of the host.
    """
    if "deepsparse" not in hardware.engines:
        general = _NO_ZEROS
    else:
        general = _VNNI if "vnni" in (hardware.isa or facts.isa) else _NO_VNNI
    return replace(general, recipes=tuple(hardware.recipes)) if hardware.recipes else general


def advice(hardware: HardwareConfig, recipe: str, facts: HostFacts | None = None) -> list[str]:
    """What is allowed and probably not meant, a sentence each.

    Args:
        hardware: the target.
        recipe: name of the recipe that is to run.
        facts: of the host; None: of this one.
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


def _unused(hardware: HardwareConfig) -> Iterator[str]:
    """Settings that none of the scenarios looks at."""
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
    # That the CPU lacks what the target itself asks for is said already.
    said = "avx2" in hardware.isa and "avx2" not in facts.isa
    for engine in hardware.engines:
        why = unusable(engine, facts)
        if why and not (said and why == "needs AVX2"):
            yield _cannot_run(engine, facts)


def _cannot_run(engine: str, facts: HostFacts) -> Mismatch:
    """What to say of an engine for which `unusable` gives a reason."""
    if unusable(engine, facts) == "not installed":
        do = f"Run: pip install '{RUNTIMES[engine].requirement}', or take it out of hardware.engines."
        refusal = expected(f"the engine {engine}", "installed", "no such package", do)
        return Mismatch(f"without {engine}: not installed", refusal)
    do = f"Take {engine} out of hardware.engines."
    refusal = expected(f"the CPU for {engine}", "x86 with AVX2 or AVX-512", facts.cpu, do)
    return Mismatch(f"without {engine}: the CPU has no AVX2", refusal)


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


def _other_imgsz(hardware: HardwareConfig, imgsz: int | None) -> Iterator[Mismatch]:
    if imgsz and hardware.imgsz and imgsz != hardware.imgsz:
        do = f"Set dataset.imgsz={hardware.imgsz}, or hardware.imgsz=null."
        refusal = expected("dataset.imgsz", f"the {hardware.imgsz} px of hardware={hardware.name}", imgsz, do)
        yield Mismatch(f"{imgsz} px instead of {hardware.imgsz} px", refusal)


def _and(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def fit_to_host(experiment: Experiment) -> tuple[Experiment, tuple[str, ...]]:
    """Hold the hardware target against this host, before anything is trained for it.

    Args:
        experiment: the checked configuration; the target counts where it verifies or measures.

    Returns:
        The experiment with what can run here of its target, and what does not fit, a clause each.

    Raises:
        ConfigError: every problem found, unless ``hardware.strict`` is false; or no engine can run.
    """
    from sparse_exp.hardware.targets import ALL_THE_SAME, compare, fitted

    hardware = experiment.hardware
    found = compare(hardware, imgsz=experiment.dataset.imgsz) if measures(experiment) else []
    if not found:
        return experiment, ()
    if hardware.strict:
        raise ConfigError([f"{mismatch.refusal} {ALL_THE_SAME}" for mismatch in found])
    return replace(experiment, hardware=fitted(hardware)), tuple(mismatch.said for mismatch in found)


def measures(experiment: Experiment) -> bool:
    """Whether a run measures anything on the hardware target."""
    return bool({"verify", "benchmark"} & set(experiment.stages))


def mismatch_sentence(target: str, mismatch: Sequence[str]) -> str:
    """What is said of a target that is measured although it does not fit the host.

    Args:
        target: its name.
        mismatch: what differs, a clause each, at least one.
    """
    return (
        f"hardware={target} does not fit here: {'; '.join(mismatch)}. What can run is measured all the same "
        "(hardware.strict=false); its numbers are not those of the target."
    )
