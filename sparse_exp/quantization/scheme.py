"""Which layers a QuantizationModifier quantizes, and how: its arguments read as SparseML 1.8.0 reads them.

SparseML has two dialects. The newer one (``scheme``, ``scheme_overrides``, ``ignore``, ``strict``) quantizes
every module without parts that is not ignored; the older one (``submodules``, ``exclude_module_types`` and
others) quantizes the convolutions within the named modules. Both see a convolution and the batch norm behind
it as one module of type ``ConvBn2d``, and quantize the two inputs of each residual addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from sparse_exp.errors import RecipeError, expected
from sparse_exp.yolov5.model import Add

DEFAULT_AVERAGING = 0.01
"""Share of a new batch in the moving average of a range, as torch's observers and SparseML have it."""

LOWEST_OF_SILU = -8.0
"""Where the range of a tensor that SiLU reads begins at most.

SiLU of what lies below is between -0.003 and 0, and finer steps above are worth more (run: yolov5s of COCO on
photos, a fifth less difference).
"""

_COMMON = {
    "start_epoch", "end_epoch", "disable_quantization_observer_epoch", "freeze_bn_stats_epoch",
    "model_fuse_fn_name", "model_fuse_fn_kwargs", "num_calibration_steps",
}  # fmt: skip
_NEWER = {"scheme", "scheme_overrides", "ignore", "strict"}
_OLDER = {
    "submodules", "reduce_range", "quantize_embeddings", "quantize_linear_activations",
    "quantize_conv_activations", "quantize_embedding_activations", "activation_bits", "weight_bits",
    "exclude_batchnorm", "exclude_module_types", "custom_quantizable_module_types",
    "activation_qconfig_kwargs", "weight_qconfig_kwargs", "tensorrt",
}  # fmt: skip
_PARTS_OF_SCHEME = {"input_activations", "weights", "output_activations", "target_hardware"}
_LEAVE_OUT = (
    "Let it leave out all but convolutions: ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]."
)


@dataclass(frozen=True)
class TensorScheme:
    """How a tensor is rounded to whole steps.

    Attributes:
        num_bits: of a step's number, 2 to 8. Steps are -2^(n-1) to 2^(n-1) - 1.
        symmetric: step 0 stands for 0.0, and the range reaches equally far to both sides.
        per_channel: each output channel of a weight has a scale of its own.
        averaging: share of a new batch in the moving average of the range, more than 0, at most 1.
        lowest: where the range begins at most below 0: what lies beyond is rounded to it.
    """

    num_bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    averaging: float = DEFAULT_AVERAGING
    lowest: float = -math.inf

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step."""
        return -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1


@dataclass(frozen=True)
class LayerScheme:
    """What of a layer is quantized, and how; None: left in floating point.

    Attributes:
        inputs: each tensor that it reads.
        weights: of a convolution, the batch norm behind it folded in.
        outputs: what it writes, behind the batch norm.
    """

    inputs: TensorScheme | None = None
    weights: TensorScheme | None = None
    outputs: TensorScheme | None = None


ONE_INPUT = (nn.SiLU, nn.MaxPool2d, nn.Upsample)
"""Modules other than convolutions and additions whose one input, and output, can be quantized."""

Schemes = dict[str, LayerScheme]
"""By the layers' published names, in the model's order."""


def layer_schemes(arguments: Mapping[str, Any], model: nn.Module) -> Schemes:
    """The layers that a QuantizationModifier quantizes, and how.

    Args:
        arguments: of the modifier, in either dialect, as plain data.
        model: the detector; not changed. It may have quantizers already.

    Returns:
        Convolutions, residual additions and, where the modifier takes them in, other modules of one input.

    Raises:
        RecipeError: SparseML would refuse the arguments, or build a model that does not run; or they ask for
            what is not supported here.
    """
    unknown = set(arguments) - _COMMON - _NEWER - _OLDER
    if unknown:
        known = ", ".join(sorted(_NEWER | _OLDER))
        raise RecipeError(
            expected(
                "each argument of a QuantizationModifier", f"one of {known}", sorted(unknown)[0], _REMOVE
            )
        )
    older, newer = _OLDER & set(arguments), _NEWER & set(arguments)
    if older and newer:
        both = f"{sorted(newer)[0]} and {sorted(older)[0]}"
        do = "Keep those of one dialect."
        raise RecipeError(expected("the arguments of a QuantizationModifier", "of one dialect", both, do))
    _check_fusing(arguments.get("model_fuse_fn_name"))
    return _Older(arguments, model).schemes() if is_older(arguments) else _Newer(arguments, model).schemes()


def is_older(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a QuantizationModifier are of the older dialect; with none of either: no."""
    return not _OLDER.isdisjoint(arguments)


def as_data(schemes: Mapping[str, LayerScheme]) -> dict[str, Any]:
    """Schemes as builtin types, as a checkpoint stores them."""
    return {name: asdict(scheme) for name, scheme in schemes.items()}


def from_data(data: Mapping[str, Any]) -> Schemes:
    """Schemes from what `as_data` made of them.

    Raises:
        TypeError, ValueError: the data are something else.
    """

    def tensor(kept: Mapping[str, Any] | None) -> TensorScheme | None:
        if kept is None:
            return None
        scheme = TensorScheme(**kept)
        if scheme.num_bits not in range(2, 9):
            raise ValueError(f"Expected from 2 to 8 bits, but got {scheme.num_bits!r}.")
        if not scheme.lowest < 0:
            raise ValueError(f"Expected a range that begins below 0, but got {scheme.lowest!r}.")
        return scheme

    return {
        str(name): LayerScheme(**{part: tensor(kept) for part, kept in layer.items()})
        for name, layer in data.items()
    }


def folded_norms(model: nn.Module) -> dict[str, str]:
    """The batch norm that is folded into each convolution, by name: the next module in the same parent."""
    return {
        name: follower
        for (name, module), (follower, other) in pairwise(_published_modules(model))
        if isinstance(module, nn.Conv2d)
        and isinstance(other, nn.BatchNorm2d)
        and name.rpartition(".")[0] == follower.rpartition(".")[0]
    }


def _published_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name, without quantizers that it may have."""
    return ((name, module) for name, module in model.named_modules() if "_quantizer" not in name)


_REMOVE = "Remove or correct it."


@dataclass(frozen=True)
class _Part:
    """A module as SparseML sees it after it has fused convolutions with batch norms."""

    name: str
    kind: str
    module: nn.Module | None = None  # None: a part that only SparseML's model has

    @property
    def is_leaf(self) -> bool:
        """Whether it has no parts of its own, and does something."""
        if self.module is None or isinstance(
            self.module, nn.Identity | nn.Dropout | nn.Sequential | nn.ModuleList
        ):
            return False
        return isinstance(self.module, ONE_INPUT) or not any(self.module.children())


def _parts(model: nn.Module) -> Iterator[_Part]:
    norms = folded_norms(model)
    for name, module in _published_modules(model):
        kind = getattr(type(module), "published", type(module)).__name__
        if name in norms:
            yield from (
                _Part(name, "ConvBn2d", module),
                _Part(f"{name}.0", "Conv2d"),
                _Part(f"{name}.1", "BatchNorm2d"),
            )
        elif name in norms.values():
            yield _Part(name, "Identity")
        else:
            yield _Part(name, kind, module)
            if isinstance(module, Add):
                yield _Part(f"{name}.functional", "FloatFunctional")


class _Newer:
    """The newer dialect.

    Args:
        arguments: of the modifier.
        model: the detector.
    """

    def __init__(self, arguments: Mapping[str, Any], model: nn.Module) -> None:
        self._parts = list(_parts(model))
        self._default = _scheme(arguments.get("scheme"), None)
        overrides = arguments.get("scheme_overrides") or {}
        self._overrides = {str(name): _scheme(value, self._default) for name, value in overrides.items()}
        self._ignore = _names(arguments, "ignore")
        if arguments.get("strict", True):
            self._check_found("scheme_overrides", list(self._overrides))
            self._check_found("ignore", self._ignore)

    def schemes(self) -> Schemes:
        """See `layer_schemes`."""
        outputs = {
            p.name: s.outputs for p in self._parts if p.kind == "FloatFunctional" and (s := self._of(p))
        }
        found = {}
        for part in self._parts:
            scheme, module = self._of(part), part.module
            if isinstance(module, Add):
                found[part.name] = _of_add(scheme, outputs.get(f"{part.name}.functional"))
            elif scheme and module and isinstance(module, nn.Conv2d):
                found[part.name] = scheme
            elif scheme and module and part.is_leaf:
                found[part.name] = _of_other(part, replace(scheme, weights=None))
            elif scheme and module and _match(part, list(self._overrides)) == part.kind:
                do = "Name a type of layer, or a module by its name."
                raise RecipeError(
                    expected("each type in scheme_overrides", "one without parts", part.kind, do)
                )
        return {name: scheme for name, scheme in found.items() if scheme != LayerScheme()}

    def _of(self, part: _Part) -> LayerScheme | None:
        if _match(part, self._ignore) is not None:
            return None
        override = _match(part, list(self._overrides))
        return self._default if override is None else self._overrides[override]

    def _check_found(self, argument: str, wanted: Sequence[str]) -> None:
        for name in wanted:
            if not any(part.name.startswith(name) or part.kind == name for part in self._parts):
                do = "Correct it, or set strict: False."
                raise RecipeError(
                    expected(f"each of {argument}", "a module or a type of the model", name, do)
                )


class _Older:
    """The older dialect.

    Args:
        arguments: of the modifier.
        model: the detector.
    """

    def __init__(self, arguments: Mapping[str, Any], model: nn.Module) -> None:
        if arguments.get("tensorrt"):
            raise RecipeError(
                expected("tensorrt", "False", True, "Batch norms are always folded; remove it.")
            )
        self._model = model
        submodules = arguments.get("submodules")
        self._submodules = None if submodules is None else _names(arguments, "submodules")
        self._excluded = _names(arguments, "exclude_module_types")
        self._custom = _names(arguments, "custom_quantizable_module_types")
        self._activations = _older_tensor(arguments, "activation", symmetric=False)
        self._weights = _older_tensor(arguments, "weight", symmetric=True)
        self._outputs = self._activations if arguments.get("quantize_conv_activations", True) else None

    def schemes(self) -> Schemes:
        """See `layer_schemes`."""
        inputs = None if "QuantStub" in self._excluded else self._activations
        found = {}
        for part in _parts(self._model):
            module = part.module
            if module is None or not self._within(part.name):
                continue
            if isinstance(module, nn.Conv2d):
                inner = part.kind in self._excluded
                found[part.name] = LayerScheme(
                    inputs, *((None, None) if inner else (self._weights, self._outputs))
                )
            elif isinstance(module, Add) and part.name not in (self._submodules or []):
                found[part.name] = LayerScheme(inputs)
            elif part.kind in self._custom:
                found[part.name] = _of_other(part, LayerScheme(inputs))
        return {name: scheme for name, scheme in found.items() if scheme != LayerScheme()}

    def _within(self, name: str) -> bool:
        if self._submodules is None:
            return True
        names = dict(self._model.named_modules())
        for wanted in self._submodules:
            if wanted not in names:
                do = "Correct it."
                raise RecipeError(expected("each of submodules", "a module of the model", wanted, do))
        return any(f"{name}.".startswith(f"{wanted}.") for wanted in self._submodules)


def _match(part: _Part, names_or_kinds: Sequence[str]) -> str | None:
    """The longest that the part's name begins with, else its kind; None where neither is among them."""
    prefixes = [wanted for wanted in names_or_kinds if wanted and part.name.startswith(wanted)]
    if prefixes:
        return max(prefixes, key=len)
    return part.kind if part.kind in names_or_kinds else None


def _of_add(scheme: LayerScheme | None, outputs: TensorScheme | None) -> LayerScheme:
    """An addition: its inputs are rounded as outputs are, or else to 8 bits, whatever is said of inputs."""
    if scheme is None:
        return LayerScheme(outputs=outputs)
    return LayerScheme(scheme.outputs or TensorScheme(), None, outputs)


def _of_other(part: _Part, scheme: LayerScheme) -> LayerScheme:
    if scheme != LayerScheme() and not isinstance(part.module, ONE_INPUT):
        got, wanted = f"{part.name} ({part.kind})", "convolutions, additions or modules of one input"
        raise RecipeError(expected("the modules that are quantized", wanted, got, _LEAVE_OUT))
    return scheme


def _scheme(given: Any, default: LayerScheme | None) -> LayerScheme:
    """A scheme of the newer dialect: an alias, or arguments of the three tensors."""
    if given is None or given in ("default", "deepsparse"):
        usual = LayerScheme(TensorScheme(), TensorScheme(symmetric=True))
        return usual if default is None or given == "deepsparse" else default
    if not isinstance(given, Mapping):
        do = "Batch norms are always folded; use 'default'."
        raise RecipeError(
            expected("a quantization scheme", "a mapping, 'default' or 'deepsparse'", given, do)
        )
    if unknown := set(given) - _PARTS_OF_SCHEME:
        wanted = f"one of {', '.join(sorted(_PARTS_OF_SCHEME))}"
        raise RecipeError(expected("each key of a quantization scheme", wanted, sorted(unknown)[0], _REMOVE))
    if given.get("target_hardware") == "tensorrt":
        raise RecipeError(expected("target_hardware", "'deepsparse' or nothing", "tensorrt", _REMOVE))
    inputs = _tensor(given.get("input_activations", {}), "input_activations")
    weights = _tensor(given.get("weights", {"symmetric": True}), "weights")
    outputs = _tensor(given.get("output_activations"), "output_activations")
    for tensor in (inputs, outputs):
        if tensor and tensor.per_channel:
            do = "Only weights have scales per channel."
            raise RecipeError(expected("the strategy of activations", "'tensor'", "channel", do))
    return LayerScheme(inputs, weights, outputs)


def _tensor(given: Any, name: str) -> TensorScheme | None:
    if given is None or given in ("null", "None"):
        return None
    known = {"num_bits", "symmetric", "strategy", "kwargs"}
    if not isinstance(given, Mapping) or set(given) - known:
        wanted = f"null, or a mapping with keys of {', '.join(sorted(known))}"
        raise RecipeError(expected(name, wanted, given, _REMOVE))
    strategy, symmetric = given.get("strategy", "tensor"), given.get("symmetric", False)
    if strategy not in ("tensor", "channel"):
        raise RecipeError(
            expected(f"the strategy of {name}", "'tensor' or 'channel'", strategy, "Change it.")
        )
    if not isinstance(symmetric, bool):
        raise RecipeError(expected(f"symmetric of {name}", "True or False", symmetric, "Change it."))
    bits, averaging = _observing(given.get("kwargs") or {}, given.get("num_bits", 8), name)
    return TensorScheme(bits, symmetric, strategy == "channel", averaging)


def _older_tensor(arguments: Mapping[str, Any], name: str, *, symmetric: bool) -> TensorScheme:
    bits = arguments.get(f"{name}_bits")
    kwargs = dict(arguments.get(f"{name}_qconfig_kwargs") or {})
    if name == "activation":
        kwargs.setdefault("reduce_range", arguments.get("reduce_range", False))
    bits, averaging = _observing(kwargs, 8 if bits is None else bits, f"{name}_qconfig_kwargs")
    return TensorScheme(bits, symmetric, averaging=averaging)


def _observing(kwargs: Mapping[str, Any], bits: Any, name: str) -> tuple[int, float]:
    """Bits and averaging constant, from the options that are passed on to torch's observers."""
    if unknown := set(kwargs) - {"reduce_range", "averaging_constant"}:
        wanted = "reduce_range or averaging_constant"
        raise RecipeError(
            expected(f"each observer option in {name}", wanted, sorted(unknown)[0], "Remove it.")
        )
    _check_bits(bits)
    bits -= bool(kwargs.get("reduce_range", False))
    averaging = kwargs.get("averaging_constant", DEFAULT_AVERAGING)
    if not isinstance(averaging, float | int) or not 0 < averaging <= 1:
        do = "Change it."
        raise RecipeError(expected("averaging_constant", "more than 0 and at most 1", averaging, do))
    return bits, float(averaging)


def _check_bits(bits: Any) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise RecipeError(
            expected("the bits of quantization", "a whole number from 2 to 8", bits, "Change it.")
        )


def _check_fusing(name: Any) -> None:
    if name is not None and str(name).lower() not in ("none", "conv_bn_relus"):
        do = "Batch norms are always folded into convolutions."
        raise RecipeError(expected("model_fuse_fn_name", "'conv_bn_relus' or nothing", name, do))


def _names(arguments: Mapping[str, Any], key: str) -> list[str]:
    given = arguments.get(key) or []
    if not isinstance(given, list | tuple | set) or not all(isinstance(name, str) for name in given):
        raise RecipeError(expected(key, "a list of names", given, "Correct it."))
    return list(given)
