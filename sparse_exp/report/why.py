"""The section "Why is it (not) faster?" of the report."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_exp.benchmark.gain import Gain, headline
from sparse_exp.benchmark.layers import Costs
from sparse_exp.benchmark.why import Why
from sparse_exp.sparsity.onnx_graph import layer_name
from sparse_exp.text import markdown_table


def to_markdown(why: Why) -> str:
    """The body of the section; empty where there is nothing to say."""
    parts = [*(_gain_part(gain) for gain in why.gains), why.zeros]
    parts += [_kinds_part(why.costs), *(_layers_part(costs) for costs in why.costs[:1])]
    if why.advice:
        parts.append("**What to try next**\n\n" + "\n".join(f"- {line}" for line in why.advice))
    return "\n\n".join(part for part in parts if part)


def layers_in_words(names: str) -> str:
    """The layers that an engine runs as one, by the name of the first, and how many more there are.

    Args:
        names: of nodes of the ONNX file, separated by commas.

    >>> layers_in_words("/model/model.6/m/m.0/cv2/conv/module/Conv_output_0_quant,/model/model.7/Mul")
    'model.6.m.0.cv2.conv and 1 more'
    """
    first, *more = names.split(",")
    return f"{layer_name(first)} and {len(more)} more" if more else layer_name(first)


def _gain_part(gain: Gain) -> str:
    """The factors of one gain, and what was not measured."""
    rows = [(step.cause, str(step.factor), "; ".join(step.measured)) for step in gain.steps]
    rows.append(("all together", str(gain.total), f"{gain.start} -> {gain.end}"))
    table = markdown_table(("cause", "times faster", "measured"), rows)
    missing = "\n".join(f"- Not measured: {line}." for line in gain.missing)
    return f"**{gain.load}**: {headline(gain)}\n\n{table}\n\n{missing}".rstrip()


def _kinds_part(all_costs: Sequence[Costs]) -> str:
    """Milliseconds and shares by kind of layer, a column for each profiled network."""
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


def _layers_part(costs: Costs) -> str:
    rows = [
        (layers_in_words(one.name), one.kind, f"{one.ms:.2f}", f"{one.share:.0%}") for one in costs.layers
    ]
    known = costs.supported
    supported = "" if known is None else f": {known:.0%} of its operators run in the engine's own code"
    table = markdown_table(("layer", "kind", "ms", "share"), rows)
    return f"**The slowest layers of {costs.cell}**{supported}\n\n{table}"
