"""Why a deployed file is or is not faster, as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_exp.benchmark.gain import Split, headline
from sparse_exp.benchmark.layers import Costs, short
from sparse_exp.benchmark.why import Why


def to_markdown(why: Why) -> str:
    """The body of the section "Why is it (not) faster?" of a report; empty where there is nothing to say."""
    parts = [_split_markdown(split) for split in why.splits]
    parts += [_kinds_markdown(why.costs), *(_layers_markdown(costs) for costs in why.costs[:1])]
    if why.advice:
        parts.append("**What to try next**\n\n" + "\n".join(f"- {line}" for line in why.advice))
    return "\n\n".join(part for part in parts if part)


def _split_markdown(split: Split) -> str:
    from sparse_exp.text import markdown_table

    rows = [(step.cause, f"{step.factor:.2f}", "; ".join(step.measured)) for step in split.steps]
    rows.append(("all together", f"{split.total:.2f}", f"{split.start} -> {split.end}"))
    table = markdown_table(("cause", "times faster", "measured"), rows)
    missing = "\n".join(f"- Not measured: {line}." for line in split.missing)
    return f"**{split.load}**: {headline(split)}\n\n{table}\n\n{missing}".rstrip()


def _kinds_markdown(all_costs: Sequence[Costs]) -> str:
    """Milliseconds and shares by kind of layer, of the profiled models beside each other."""
    from sparse_exp.text import markdown_table

    if not all_costs:
        return ""
    kinds = dict.fromkeys(kind for costs in all_costs for kind in costs.kinds)
    rows = [(kind, *(_part(costs, kind) for costs in all_costs)) for kind in kinds]
    totals = ("all together", *(f"{costs.ms:.1f}" for costs in all_costs))
    table = markdown_table(("ms by kind of layer", *(costs.cell for costs in all_costs)), [*rows, totals])
    return f"**Where the time goes** ({all_costs[0].note}; profiling takes time itself)\n\n{table}"


def _part(costs: Costs, kind: str) -> str:
    share = costs.kinds.get(kind, 0.0)
    return f"{costs.ms * share:.1f} ({share:.0%})"


def _layers_markdown(costs: Costs) -> str:
    from sparse_exp.text import markdown_table

    rows = [(short(one.name), one.kind, f"{one.ms:.2f}", f"{one.share:.0%}") for one in costs.layers]
    known = costs.supported
    supported = "" if known is None else f": {known:.0%} of its operators run in the engine's own code"
    table = markdown_table(("layer", "kind", "ms", "share"), rows)
    return f"**The slowest layers of {costs.cell}**{supported}\n\n{table}"
