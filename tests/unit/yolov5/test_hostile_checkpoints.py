"""Checkpoints that are made to take for ever, or all memory: one clear error, within bounds."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from bounded import outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_exp.errors import CheckpointError
from sparse_exp.yolov5 import YOLOv5
from sparse_exp.yolov5.checkpoint import FORMAT, read_checkpoint, save_checkpoint
from sparse_exp.yolov5.restricted import open_restricted

START, STOP = b"\x80\x02", b"."
FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def archive(path: Path, pickled: bytes, *, kind: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """A checkpoint around a pickle written by hand; members are storages."""
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", START + pickled + STOP)
        for name, content in members.items():
            file.writestr(f"archive/data/{name.removeprefix('_')}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tower(floors: int, *, of: bytes = b"\x86") -> bytes:
    """Tuples each of which holds the one before twice; the last is number ``floors`` of the memo."""
    steps = (b"h" + bytes([i]) + b"h" + bytes([i]) + of + b"q" + bytes([i + 1]) for i in range(floors))
    return b")q\x00" + b"".join(steps)


def storage(key: str, numel: int) -> bytes:
    return b"(" + text("storage") + FLOATS + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(numel: int, key: str = "0", claimed: int | None = None) -> bytes:
    size = number(numel) + b"\x85"
    one = b"K\x01\x85"
    held = storage(key, numel if claimed is None else claimed)
    return REBUILD + b"(" + held + b"K\x00" + size + one + b"\x89" + b"N" + b"tR"


def mapping(**values: bytes) -> bytes:
    return b"}" + b"".join(text(name) + value + b"s" for name, value in values.items())


LIST_OF_A_MILLION = b"](" + b"N" * 10**6 + b"eq\x01"
COPIES = b"c__builtin__\nlist\nq\x00" + LIST_OF_A_MILLION + b"]" + b"h\x00h\x01\x85Ra" * 1000
ARGUMENTS = b"(" + b"N" * 50_000 + b"tq\x01"
PICKLES = {
    "a key whose hash takes 2^60 steps": tower(60) + b"}h\x3cNs",
    "several such keys": tower(60) + b"}(h\x3cNh\x3bNu",
    "a set of such": tower(60) + b"c__builtin__\nset\n]h\x3ca\x85R",
    "a mapping of such": tower(60) + b"ccollections\nOrderedDict\n]h\x3cN\x86a\x85R",
    "names that are such": tower(60)
    + mapping(format=text(FORMAT), names=b"]h\x3ca", model=mapping(names=b"h\x3c")),
    "a model of such": tower(60) + mapping(model=b"h\x3c"),
    "lists copied a thousand times": COPIES,
    "objects that share their arguments": ARGUMENTS + b"ccollections\ndeque\nq\x00]" + b"h\x00h\x01Ra" * 9999,
    "objects that share arguments and are made without a call": ARGUMENTS
    + b"cmodels\nA\nq\x00]" + b"h\x00h\x01\x81a" * 9999,
    "a hundred thousand classes": b"".join(b"cmodels\n%d\n" % i for i in range(100_000)),
    "a tensor of a million axes": LIST_OF_A_MILLION
    + REBUILD + b"(" + storage("0", 1) + b"K\x00h\x01h\x01\x89NtR",
    "a tensor of 10^12 elements": mapping(model=mapping(a=tensor(10**12))),
    "10^12 elements of a storage of one": mapping(model=mapping(a=tensor(10**12, claimed=1))),
    "a list that holds itself": b"]q\x00h\x00a",
    "a maker of mappings that makes itself": b"ccollections\nOrderedDict\nq\x00(h\x00)}}tb)R",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_bounded_cost(name, tmp_path):
    path = archive(tmp_path / "evil.pt", PICKLES[name], _0=bytes(4))
    ended = outcome(lambda: read_checkpoint(path))
    assert ended.startswith("CheckpointError")
    assert str(path) in ended


def test_tensors_that_share_one_storage_cannot_grow_beyond_the_file(tmp_path):
    numel = 2_000_000
    many = mapping(**{f"t{i}": tensor(numel) for i in range(1000)})
    path = archive(tmp_path / "evil.pt", mapping(model=many), _0=bytes(4 * numel))
    assert "far larger than the file" in outcome(lambda: read_checkpoint(path))


def test_members_that_unpack_or_overlap(tmp_path):
    packed = archive(tmp_path / "a.pt", b"N", kind=zipfile.ZIP_DEFLATED, _0=bytes(10**9 // 4))
    assert packed.stat().st_size < 10**6
    assert "compressed or too large" in outcome(lambda: read_checkpoint(packed), memory=10**8)
    whole = archive(tmp_path / "b.pt", b"N", _0=bytes(10**6)).read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    start = whole.index(b"PK\x01\x02")
    entries = whole[start:end]
    last = entries[entries.rindex(b"PK\x01\x02") :]
    many = b"".join([entries, *(last.replace(b"data/0", b"data/%c" % letter) for letter in b"abcdefgh")])
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 10, 10, len(many), start, 0)
    (tmp_path / "b.pt").write_bytes(whole[:start] + many + tail)
    assert len(zipfile.ZipFile(tmp_path / "b.pt").infolist()) == 10
    assert "compressed or too large" in outcome(lambda: read_checkpoint(tmp_path / "b.pt"))


def test_without_a_head_there_are_not_a_million_classes(tmp_path):
    save_checkpoint(
        tmp_path / "a.pt", model_state={"w": torch.ones(1)}, size="n", names=["a"] * 10**6, recipe="",
        phase="dense", epoch=1.0, metrics={}, num_classes=10**6, imgsz=64,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="its head"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "wrong", [{"num_classes": 10**9}, {"imgsz": 10**9}, {"num_classes": -1}, {"widths": {"a": 10**9}}]
)
def test_what_a_checkpoint_of_ours_claims_fits_its_weights(wrong, tmp_path):
    claimed = {"num_classes": 2, "imgsz": 64, **wrong}
    save_checkpoint(
        tmp_path / "a.pt", model_state=YOLOv5("n", 2).state_dict(), size="n", names=["a", "b"], recipe="",
        phase="dense", epoch=1.0, metrics={}, **claimed,
    )  # fmt: skip
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pt")


def test_keys_that_checkpoints_have(tmp_path):
    content = {"state": {0: {"step": 1}, ("a", 1): 2.0, None: True}, "set": {1, "x"}}
    torch.save(content, tmp_path / "a.pt")
    with open_restricted(tmp_path / "a.pt") as file:
        assert file.tree == content


PARTS = [
    b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"N", b"\x88", b"K\x05",
    b"R", b"\x81", b"b", b"Q", text("a"), text("storage"), text("0"), text("state_dict"), FLOATS, REBUILD,
    storage("0", 1), tensor(1), number(2**40), b"cmodels\nM\n", b"c__builtin__\nset\n",
    b"c__builtin__\nlist\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"cnumpy\nndarray\n",
    *(letter + bytes([i]) for letter in (b"h", b"q") for i in range(4)),
]  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(PARTS), max_size=60).map(b"".join)


def try_programs(path: Path, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(PROGRAMS)
    def attempt(program: bytes) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("archive/data.pkl", START + program + STOP)
            zipped.writestr("archive/data/0", bytes(4))
        path.write_bytes(file.getvalue())
        try:
            read_checkpoint(path)
        except CheckpointError:
            return

    attempt()


def test_any_pickle_is_one_clear_error_or_harmless(tmp_path):
    try_programs(tmp_path / "any.pt", 150)


@pytest.mark.slow
def test_many_pickles_are_one_clear_error_or_harmless(tmp_path):
    try_programs(tmp_path / "any.pt", 20_000)
