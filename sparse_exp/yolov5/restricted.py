"""Reads PyTorch checkpoints without running anything that they ask for.

A checkpoint is a pickle: a small program that may call any function. Before any of it runs, its opcodes are
compared with a short list. Storages and functions that rebuild tensors then become plain records, and all
else that it names becomes a stand-in that runs nothing and only keeps its arguments and state: so settings,
loggers and other objects beside the weights are no obstacle. What would have to be run is refused by name
when the pickle calls it: any function, and classes of Python's own library but those of plain data. Tensors
are made last, from records whose bounds have been checked.

File format: https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/serialization (zip archive with
``data.pkl`` and one uncompressed member per storage).
"""

from __future__ import annotations

import _compat_pickle
import io
import math
import pickle
import pickletools
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_exp.errors import CheckpointError

_OPCODES = frozenset(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "  # noqa: SIM905
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_CONTAINERS: dict[str, type] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    **{f"{home}.{t.__name__}": t for home in ("builtins", "__builtin__") for t in (dict, list, set, tuple)},
}
_DATA_MODULES = (  # all that they hold is data, or makes data
    *("models.", "utils.", "yolov5.", "ultralytics.", "torch.nn.modules.", "numpy."),
    *("argparse.", "collections.", "datetime.", "decimal.", "enum.", "fractions.", "pathlib.", "uuid."),
)
_DATA_NAMES = frozenset(
    "_codecs.encode types.SimpleNamespace torch.device "  # noqa: SIM905
    "builtins.frozenset builtins.bytearray builtins.complex builtins.slice builtins.range "
    "__builtin__.frozenset __builtin__.bytearray __builtin__.complex __builtin__.slice "
    "__builtin__.xrange".split()
)
_PYTHONS_OWN = sys.stdlib_module_names | _compat_pickle.IMPORT_MAPPING.keys()  # by old names, too
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_PICKLE_BYTES = 16 * 2**20
_MOST_VALUES = 10_000_000  # in the pickled object, those in shared parts counted wherever they stand
_MOST_COPIED = 1_000_000  # values that are copied from one container into another
_MOST_NAMES = 10_000  # of functions and classes
_MOST_AXES = 16  # of a tensor
_MOST_READ = 16  # times the file's size: tensors may share storages, and become float32
_KEYS = (str, int, float, bool, bytes, type(None))


class StorageRecord(NamedTuple):
    """Where the numbers of a tensor lie in the archive.

    Attributes:
        key: name of the archive's member under ``data/``.
        dtype: type of its numbers.
        numel: count of its numbers.
    """

    key: str
    dtype: torch.dtype
    numel: int


class TensorRecord(NamedTuple):
    """A tensor as the checkpoint describes it.

    Attributes:
        storage: where its numbers lie.
        offset: of the first element in the storage, in elements.
        size: its shape.
        stride: of each axis, in elements. With ``offset`` and ``size`` it stays within the storage.
    """

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """A stand-in for an object whose class is not run; it keeps its arguments and its state.

    Attributes:
        name: of the class that it stands for, with its module.
        refusal: why none may be made; "" where one may.
        args: arguments of the constructor.
        state: what the pickle sets as its ``__dict__``.
    """

    name, refusal = "", ""
    args: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *_: Any) -> Inert:
        """Make a stand-in, whatever the arguments."""
        if cls.refusal:
            raise CheckpointError(cls.refusal)
        made = object.__new__(cls)
        made.args, made.state = (), {}  # pickles make objects without `__init__`, too
        return made

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item of a map, and keep nothing of it; likewise below those of a list."""

    def append(self, value: Any) -> None:  # noqa: D102
        pass

    def extend(self, values: Any) -> None:  # noqa: D102
        pass


class RestrictedFile:
    """An open checkpoint.

    Attributes:
        tree: the pickled object, made of builtin containers, numbers, strings, `TensorRecord` and `Inert`.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self._root = _root(path, archive)
        data = self._member("data.pkl")
        _check_opcodes(path, data)
        self.tree = _Unpickler(path, data).load()
        if _values(self.tree, {}) > _MOST_VALUES:
            raise CheckpointError(damaged(path, f"it stands for more than {_MOST_VALUES} values"))
        self._left = _MOST_READ * path.stat().st_size  # bytes

    def tensor(self, record: TensorRecord) -> Tensor:
        """Read the tensor that a record describes into its own memory; floating point becomes float32.

        Raises:
            CheckpointError: its storage is missing, or has another length than the record says; or all
                tensors together are far larger than the file.
        """
        key, dtype, numel = record.storage
        data = self._member(f"data/{key}")
        self._left -= len(data) + max(4, dtype.itemsize) * math.prod(record.size)
        if self._left < 0:
            raise CheckpointError(damaged(self._path, "its tensors are far larger than the file"))
        if len(data) != numel * dtype.itemsize:
            raise CheckpointError(damaged(self._path, f"storage {key!r} has {len(data)} bytes"))
        # frombuffer refuses an empty buffer
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensor = flat.as_strided(record.size, record.stride, record.offset).clone()
        return tensor.float() if dtype.is_floating_point else tensor

    def _member(self, name: str) -> bytes:
        try:
            return self._archive.read(f"{self._root}/{name}")
        except KeyError:
            raise CheckpointError(damaged(self._path, f"it has no {name!r}")) from None


@contextmanager
def open_restricted(path: Path) -> Iterator[RestrictedFile]:
    """Open a checkpoint written by ``torch.save``.

    Args:
        path: the file.

    Yields:
        The file. All but its tensors has been read.

    Raises:
        CheckpointError: there is no such file, it is no zip archive of PyTorch, is damaged, or asks to run
            something.
    """
    try:
        _check_kind(path)
        with zipfile.ZipFile(path) as archive:
            yield RestrictedFile(path, archive)
    except CheckpointError:
        raise
    except Exception as error:  # a malformed archive or pickle may raise anything
        raise CheckpointError(damaged(path, f"{type(error).__name__}: {error}")) from error


def damaged(path: Path, problem: str, kind: str = "PyTorch checkpoint") -> str:
    """The message for a damaged file.

    Args:
        path: the file.
        problem: continues "..., but"; brought into one line of at most 200 characters.
        kind: of the file that was expected.
    """
    problem = " ".join(problem.split()).encode("unicode_escape").decode()[:200].rstrip(".")
    return f"Expected {path} to be a whole {kind}, but {problem}. Fetch or write it again."


def _check_kind(path: Path) -> None:
    """Refuse a file that is no zip archive, and say what it is instead."""
    if not path.is_file():
        raise CheckpointError(damaged(path, "there is no such file"))
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(damaged(path, "it is empty"))
    if other := _other_kind(path, start):
        raise CheckpointError(f"Expected {path} to be a PyTorch checkpoint, but it is {other}.")
    if start.startswith(_LEGACY_MAGIC) or tarfile.is_tarfile(path):
        message = f"Expected {path} to be in the zip format of PyTorch, but it is in the one before 1.6."
        raise CheckpointError(f"{message} Load it with an older release and save it again.")
    if not zipfile.is_zipfile(path):
        cut = start.startswith(b"PK\x03\x04")
        raise CheckpointError(damaged(path, "it is cut off" if cut else "it is no zip archive"))


def _other_kind(path: Path, start: bytes) -> str:
    """What a file is that users often give in place of a checkpoint; "" where it may be a checkpoint."""
    text = start.lstrip().lower()
    if path.suffix.lower() == ".onnx":
        return "an ONNX model, which cannot be trained. Give the .pt file that it was exported from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page. Fetch it again, from the address of the file itself"
    lfs = text.startswith(b"version https://git-lfs")
    return "a pointer of Git LFS. Fetch the file that it stands for: git lfs pull" if lfs else ""


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """The archive's top folder; refuses TorchScript, compressed or too large members, big-endian numbers."""
    members = archive.infolist()
    if any(m.filename.count("/") == 1 and m.filename.endswith("/constants.pkl") for m in members):
        do = "Give the .pt file that it was exported from."
        raise CheckpointError(f"Expected {path} to be a checkpoint, but it is a TorchScript program. {do}")
    pickles = [m for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(damaged(path, "the archive holds no data.pkl"))
    total = sum(m.file_size for m in members)
    packed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
    if packed or total > path.stat().st_size or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(damaged(path, "its members are compressed or too large"))
    root = pickles[0].filename.partition("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(damaged(path, "its numbers are big-endian"))
    return root


def _check_opcodes(path: Path, data: bytes) -> None:
    """Refuse a pickle with an opcode that is not on the list, before any of it runs."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise CheckpointError(_refused(path, f"the pickle opcode {opcode.name}"))
        # the memo is an array: a huge index would make it that long
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data):
            raise CheckpointError(damaged(path, "its memo index is out of range"))


def _is_data(full: str) -> bool:
    """Whether a name stands for a class whose objects are data: by its module, or spelled as classes are."""
    if full in _DATA_NAMES or full.startswith(_DATA_MODULES):
        return True
    first, last = full.partition(".")[0], full.rpartition(".")[2]
    return first not in _PYTHONS_OWN and last.lstrip("_")[:1].isupper()


def _refused(path: Path, what: str) -> str:
    shown = what.encode("unicode_escape").decode()[:200]
    return (
        f"Expected {path} to hold weights only, but it asks to run {shown}, which is refused. "
        "Get the checkpoint from its publisher, or save its state dict alone."
    )


def _values(node: Any, known: dict[int, int]) -> int:
    """Values in an object with all shared parts written out; a long text counts as several."""
    if isinstance(node, str | bytes):
        return 1 + len(node) // 64
    if isinstance(node, dict):
        parts = [*node, *node.values()]
    elif isinstance(node, list | tuple | set):
        parts = list(node)
    elif isinstance(node, Inert):
        parts = [*node.args, node.state]
    else:
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # what contains itself counts once there
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


class _Maker:
    """Calls a function. A pickle cannot change what it calls, as it could that of `functools.partial`."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle would change how objects are made")


class _Unpickler(pickle._Unpickler):  # that in Python, whose steps can be looked at
    """Resolves names and storages to the records and stand-ins of this module.

    Each file gets its own stand-ins: a pickle may set attributes of the objects that it is given, and these
    must not reach the next file.

    Keys are scalars: the hash of tuples that hold each other twice, sixty deep, takes 2^60 steps.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # typeshed does not know it, nor the methods below

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._stand_ins: dict[str, Any] = {}
        self._copied = 0

    def load_setitem(self) -> None:
        """Set one key of a mapping."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """Set several keys of a mapping."""
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_reduce(self) -> None:
        """Call something; many calls may share their arguments."""
        self._count(self.stack[-1])
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        """Make an object; many may share their arguments."""
        self._count(self.stack[-1])
        super().load_newobj()  # type: ignore[misc]

    def load_newobj_ex(self) -> None:
        """Make an object with named arguments, too."""
        self._count([*self.stack[-2], *self.stack[-1]])
        super().load_newobj_ex()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _count(self, items: Any) -> None:
        """Count values that are copied."""
        self._copied += len(items)
        if self._copied > _MOST_COPIED:
            raise ValueError(f"it copies more than {_MOST_COPIED} values")

    def _filled(self, kind: type, items: Any = ()) -> Any:
        """A container of other values, or a copy of one."""
        self._count(items)
        if issubclass(kind, dict):
            _check_keys(items if isinstance(items, dict) else [key for key, _ in items])
        elif issubclass(kind, set):
            _check_keys(items)
        return kind(items)

    def find_class(self, module: str, name: str) -> Any:
        """What makes a record, a container or a stand-in for a name; nothing is imported."""
        full = f"{module}.{name}"
        if full in _STORAGES:
            return _STORAGES[full]
        if len(self._stand_ins) > _MOST_NAMES:
            raise CheckpointError(damaged(self._path, f"it names more than {_MOST_NAMES} classes"))
        if full in _CONTAINERS:
            return _Maker(partial(self._filled, _CONTAINERS[full]))
        if full not in self._stand_ins:
            rebuild = _REBUILDERS.get(full)
            refusal = "" if _is_data(full) else _refused(self._path, full)
            inert = type("Inert", (Inert,), {"name": full, "refusal": refusal})
            self._stand_ins[full] = _Maker(rebuild) if rebuild else inert
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> StorageRecord:
        """The record of a storage from ``("storage", type, key, location, numel)``."""
        kind, dtype, key, _, numel = pid
        if isinstance(dtype, type) and issubclass(dtype, Inert):  # numbers of a kind that is not known
            raise CheckpointError(_refused(self._path, dtype.name))
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise CheckpointError(damaged(self._path, "it has a malformed storage"))
        _check_counts([numel])
        return StorageRecord(key, dtype, numel)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRecord:
    """The record of a tensor; raises ValueError unless it lies within its storage."""
    if not isinstance(storage, StorageRecord) or len(size) != len(stride) or len(size) > _MOST_AXES:
        message = "malformed tensor"
        raise ValueError(message)
    _check_counts([offset, *size, *stride])
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else 0
    # repeated elements (stride 0) are refused too: with them a small file could become a huge tensor
    if elements > storage.numel or (elements and last >= storage.numel):
        message = "a tensor lies outside its storage"
        raise ValueError(message)
    return TensorRecord(storage, offset if elements else 0, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.defaultdict": lambda *_: {},
}


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        parts = key if type(key) is tuple and len(key) <= _MOST_AXES else (key,)
        if not all(type(part) in _KEYS or isinstance(part, Inert | TensorRecord | type) for part in parts):
            raise ValueError("a key in it is no scalar")


def _check_counts(values: list[Any]) -> None:
    if not all(type(v) is int and 0 <= v < 2**40 for v in values):
        message = "a size is no count"
        raise ValueError(message)
