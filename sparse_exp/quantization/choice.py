"""How layers are quantized where the recipe leaves it open: as suits the target's engines and CPU."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sparse_exp.config.schema import HardwareConfig, RecipeConfig
from sparse_exp.errors import RecipeError
from sparse_exp.quantization.scheme import LOWEST_OF_SILU, Schemes, TensorScheme, folded_norms, is_older

_X86 = ("x86_64", "AMD64")
_ALIASES = (None, "default", "deepsparse")  # of the usual scheme
_BEFORE_SILU = TensorScheme(lowest=LOWEST_OF_SILU)


@dataclass(frozen=True)
class QuantizationChoice:
    """What is chosen for all quantized layers.

    Attributes:
        per_channel: each output channel of a weight gets a scale of its own, or each layer one; None: as the
            recipe says.
        num_bits: of weights, at most; None: as the recipe says.
        outputs: outputs of convolutions are rounded, too, behind their batch norms. Those of the head, which
            has none, are not.
        why: in words.
    """

    per_channel: bool | None = None
    num_bits: int | None = None
    outputs: bool = False
    why: str = "as the recipe says"

    @property
    def decided(self) -> list[bool | int | None]:
        """What changes a training; not why."""
        return [self.per_channel, self.num_bits, *([True] if self.outputs else [])]

    def applied_to(self, schemes: Schemes, arguments: Mapping[str, Any], model: nn.Module) -> Schemes:
        """The schemes of a recipe with this choice.

        Args:
            schemes: of the model's layers.
            arguments: of the modifier that they come from. A strategy that it names holds.
            model: the detector; not changed.
        """
        named = "strategy" in set(_keys(arguments))
        before_silu = folded_norms(model) if self.outputs else {}
        found = {}
        for name, scheme in schemes.items():
            if weights := scheme.weights:
                if self.per_channel is not None and not named:
                    weights = replace(weights, per_channel=self.per_channel)
                if self.num_bits is not None:
                    weights = replace(weights, num_bits=min(weights.num_bits, self.num_bits))
            outputs = scheme.outputs
            if name in before_silu and scheme.inputs and weights:
                outputs = outputs or _BEFORE_SILU
            found[name] = replace(scheme, weights=weights, outputs=outputs)
        return found

    def written_into(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that say themselves what `applied_to` does, for SparseML, which reads nothing else.

        Args:
            arguments: of a QuantizationModifier, in either dialect. What is not allowed in them stays.

        Raises:
            RecipeError: the older dialect has no word for a scale for each output channel; or outputs are to
                be rounded.
        """
        written = dict(arguments)
        if self == AS_THE_RECIPE_SAYS:
            return written
        if self.outputs:
            raise RecipeError(
                "recipe.train_outputs is for recipe.engine=native only. Leave out one of the two."
            )
        if is_older(arguments):
            if self.per_channel:
                raise RecipeError(
                    "SparseML cannot give each output channel its own scale where a QuantizationModifier has "
                    "arguments of the older dialect, such as submodules. Set recipe.weight_scales=tensor, or "
                    "recipe.engine=native."
                )
            bits, options = arguments.get("weight_bits"), arguments.get("weight_qconfig_kwargs")
            return {**written, "weight_bits": self._bits(8 if bits is None else bits, options)}
        named = "strategy" in set(_keys(arguments))
        usual = {} if arguments.get("scheme") in _ALIASES else arguments["scheme"]
        written["scheme"] = self._scheme(usual, named=named)
        if isinstance(overrides := arguments.get("scheme_overrides"), Mapping):
            written["scheme_overrides"] = {
                layer: self._scheme({} if scheme == "deepsparse" else scheme, named=named)
                for layer, scheme in overrides.items()
            }
        return written

    def _scheme(self, scheme: Any, *, named: bool) -> Any:
        """A scheme of the newer dialect with this choice; one that stands for the modifier's own stays."""
        weights = scheme.get("weights", {"symmetric": True}) if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping):  # left in floating point, or refused later
            return scheme
        weights = {**weights, "num_bits": self._bits(weights.get("num_bits", 8), weights.get("kwargs"))}
        if self.per_channel is not None and not named:
            weights["strategy"] = "channel" if self.per_channel else "tensor"
        return {**scheme, "weights": weights}

    def _bits(self, bits: Any, options: Any) -> Any:
        """Bits as they are to be said, of which ``reduce_range`` among an observer's options takes one."""
        if self.num_bits is None or type(bits) is not int:
            return bits
        reduced = isinstance(options, Mapping) and bool(options.get("reduce_range"))
        return min(bits, self.num_bits + reduced)


AS_THE_RECIPE_SAYS = QuantizationChoice()


def choose_quantization(
    recipe: RecipeConfig, hardware: HardwareConfig, host_isa: Sequence[str]
) -> QuantizationChoice:
    """Choose scales and bits of weights, and whether outputs are rounded in training.

    A scale for each output channel is more accurate, and as fast in ONNX Runtime and OpenVINO, but halves the
    speed of DeepSparse's sparse convolutions. On x86 CPUs without VNNI sums of 8-bit products saturate in 16
    bits; with 7-bit weights they do not.

    Args:
        recipe: its ``weight_scales`` and ``weight_bits``, which hold unless they are ``auto``, and
            ``train_outputs``.
        hardware: the target, with the engines that are here.
        host_isa: instruction sets of this machine, which count where the target names none.
    """
    if recipe.weight_scales == "auto":
        per_channel = "deepsparse" not in hardware.engines
        scales = f"DeepSparse is {'not ' if per_channel else ''}among the engines"
    else:
        per_channel, scales = recipe.weight_scales == "channel", "recipe.weight_scales"
    if recipe.weight_bits == "auto":
        isa = hardware.isa or host_isa
        saturates = "vnni" not in isa and (bool(hardware.isa) or platform.machine() in _X86)
        num_bits, bits = (
            (7, "the CPU has no VNNI") if saturates else (8, "the CPU multiplies them as they are")
        )
    else:
        num_bits, bits = int(recipe.weight_bits), "recipe.weight_bits"
    scope = "a scale for each output channel" if per_channel else "one scale for a layer"
    why = f"weights with {scope} ({scales}), {num_bits} bits ({bits})"
    if recipe.train_outputs:
        why += "; outputs, too (recipe.train_outputs)"
    return QuantizationChoice(per_channel, num_bits, recipe.train_outputs, why)


def _keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from _keys(value)
