"""Read the state dicts that SparseML's QAT modules write, as in our versions before 0.2 and in SparseZoo.

SparseML wraps a layer whose input is rounded (``.module``, ``.quant``), fuses a convolution with its batch
norm (``.bn`` within it, or ``.0`` and ``.1`` where it is not quantized), and keeps torch's observers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from sparse_exp.quantization.modules import Quantizer
from sparse_exp.quantization.quantizers import published_name
from sparse_exp.quantization.scheme import folded_norms

_OBSERVER = r"\.activation_post_process"
# Quantizers, by what their names end with; in ours a layer's name comes before.
_QUANTIZERS = {
    rf"\.quant{_OBSERVER}": "input_quantizer",
    rf"\.input_quant_stubs\.(\d){_OBSERVER}": r"input_quantizers.\1",
    r"(?:\.module)?\.weight_fake_quant": "weight_quantizer",
    rf"(?:\.forward_fn)?\.functional{_OBSERVER}": "output_quantizer",
    rf"(?:\.module)?{_OBSERVER}": "output_quantizer",
}
_ENTRY = re.compile(rf"^(.+?)(?:\.(scale)|{_OBSERVER}\.(min_val|max_val))$")


def published_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights and statistics of a quantized state dict, under the names of the published model.

    Args:
        state: ours, or SparseML's.
        model: a detector of the same size.
    """
    norms, found = folded_norms(model), {}
    for name, value in state.items():
        if not _is_quantizer(name):
            found[_published(name, norms)] = value
    return found


def from_sparseml(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of SparseML's QAT modules as one of ours.

    Args:
        state: by SparseML's names.
        model: of the same size, with quantizers as the recipe of these weights asks for.

    Returns:
        By our names.
    """
    found, norms = published_state(state, model), folded_norms(model)
    own = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer)}
    observed: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if _is_quantizer(name) and (entry := _ENTRY.match(name)):
            observed.setdefault(_place(entry[1], norms), {})[entry[2] or entry[3]] = value
    for name, values in observed.items():
        ours = _buffers(values, own[name]) if name in own else {}
        found |= {f"{name}.{part}": value for part, value in ours.items()}
    return found


def _buffers(values: Mapping[str, Tensor], quantizer: Quantizer) -> dict[str, Tensor]:
    """A quantizer's buffers from an observer's, whose zero point is not taken: it may count steps from 0."""
    scale, low, high = (values[name].float().reshape(-1) for name in ("scale", "min_val", "max_val"))
    if not low.numel() or not bool((low <= high).all()):  # it has seen nothing
        return {name: value.clone() for name, value in quantizer.named_buffers()}
    zero_point = quantizer.zero_point_of(low, scale)
    return {"scale": scale, "zero_point": zero_point, "low": low, "high": high}


def _is_quantizer(name: str) -> bool:
    return "_quantizer" in name or "fake_quant" in name or "activation_post_process" in name


def _place(name: str, norms: Mapping[str, str]) -> str:
    """Where a quantizer of SparseML's is in ours; outputs are rounded behind the batch norm."""
    for pattern, ours in _QUANTIZERS.items():
        if match := re.search(f"{pattern}$", name):
            layer, part = name[: match.start()], match.expand(ours)
            return f"{norms.get(layer, layer) if part == 'output_quantizer' else layer}.{part}"
    raise ValueError(f"Expected the name of a quantizer, but got {name!r}.")


def _published(name: str, norms: Mapping[str, str]) -> str:
    """The published name of a weight or statistic."""
    for conv, norm in norms.items():
        if name.startswith(f"{conv}."):
            part = name.removeprefix(f"{conv}.").removeprefix("module.")
            if part.startswith(("bn.", "1.")):
                return f"{norm}.{part.partition('.')[2]}"
            return f"{conv}.{part.removeprefix('0.')}"
    return published_name(name)
