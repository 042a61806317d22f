import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparse_exp.errors import CheckpointError
from sparse_exp.yolov5 import YOLOv5, restricted
from sparse_exp.yolov5.checkpoint import read_checkpoint, save_checkpoint
from sparse_exp.yolov5.restricted import open_restricted


class Asks:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def refused(path):
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return str(raised.value)


def archive(path, data, **members):
    """A checkpoint around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in members.items():
            file.writestr(f"archive/data/{name.removeprefix('_')}", content)
    return path


@pytest.fixture
def marker(tmp_path):
    """A file that must not come to be."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the checkpoint ran code"


def cases(marker: Path):
    touch = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    inside = nn.Sequential(nn.Conv2d(1, 1, 1))
    inside[0].evil = Asks(os.system, touch)
    return {
        f"{os.system.__module__}.system": {"model": Asks(os.system, touch)},
        "builtins.eval": {"model": OrderedDict(weight=Asks(eval, code))},
        "builtins.exec": Asks(exec, code),
        "builtins.getattr": {"ema": Asks(getattr, marker, "touch")},
        "commands.Popen": [Asks(__import__("subprocess").Popen, ["touch", str(marker)])],
        "torch.serialization.load": {"model": Asks(torch.load, str(marker))},
        "io.open": {"names": Asks(open, str(marker), "w")},
        "shutil.rmtree": {"optimizer": {"state": [Asks(__import__("shutil").rmtree, str(marker.parent))]}},
    }, inside


@pytest.mark.parametrize(
    "name",
    ["posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "commands.Popen",
     "torch.serialization.load", "io.open", "shutil.rmtree"],
)  # fmt: skip
def test_checkpoints_that_ask_to_run_code_are_refused_by_name(name, marker, tmp_path):
    # torch writes the second pickle protocol, in which builtins and subprocess have the names of Python 2
    contents, _ = cases(marker)
    torch.save(contents[name], tmp_path / "evil.pt")
    message = refused(tmp_path / "evil.pt")
    assert name.replace("builtins", "__builtin__") in message


def test_code_hidden_in_the_state_of_an_allowed_module_is_refused(marker, tmp_path):
    _, inside = cases(marker)
    torch.save({"model": inside}, tmp_path / "evil.pt")
    assert "posix.system" in refused(tmp_path / "evil.pt")


def test_the_test_files_are_really_dangerous(tmp_path):
    target = tmp_path / "executed"
    torch.save({"model": Asks(os.system, f"touch {target}")}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert target.exists()


class Settings(dict):
    """As packages of settings make them: a map of a class of its own."""


class Logger:
    """As training scripts keep them."""

    def __init__(self):
        self.lines, self.parent = [1, 2], None


class Numbers(list):
    """A list of a class of its own."""


def test_what_lies_beside_the_weights_is_ignored(tmp_path):
    import collections
    import datetime
    import fractions
    import uuid

    beside = {
        "settings": Settings(lr=0.1), "logger": Logger(), "numbers": Numbers([1, 2]), "id": uuid.UUID(int=1),
        "day": datetime.date(2026, 1, 1), "counts": collections.Counter(a=2), "kinds": frozenset("ab"),
        "found": collections.defaultdict(list, a=[1]), "share": fractions.Fraction(1, 3),
        "bytes": b"\x00\xff",
        "random": np.random.default_rng(0).bit_generator.state,
        "queue": collections.deque([1]), "schedule": torch.optim.lr_scheduler.LambdaLR,
        "loss": torch.nn.functional.binary_cross_entropy, "run": os.system,  # named, and not called
    }  # fmt: skip
    torch.save({"model": YOLOv5("n", 2).state_dict(), "names": ["a", "b"], **beside}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").names == ("a", "b")


@pytest.mark.parametrize("place", ["beside", "settings", "logger"])
def test_calls_beside_the_weights_are_refused_all_the_same(place, marker, tmp_path):
    call = Asks(os.system, f"touch {marker}")
    logger = Logger()
    logger.parent = call
    content = {"beside": call, "settings": Settings(a=call), "logger": logger}[place]
    torch.save({"model": YOLOv5("n", 2).state_dict(), place: content}, tmp_path / "evil.pt")
    assert "posix.system" in refused(tmp_path / "evil.pt")


def test_names_reached_through_an_allowed_one_stay_inert(marker, tmp_path):
    # it looks like a class of an allowed module, and is a stand-in that is never resolved
    code = f"open({str(marker)!r}, 'w')".encode()
    call = b"cmodels.common\n__builtins__.eval\n(X" + struct.pack("<I", len(code)) + code + b"tR."
    path = archive(tmp_path / "x.pt", b"\x80\x02" + call)
    with open_restricted(path) as file:
        assert file.tree.args == (code.decode(),)
    refused(path)


@pytest.mark.parametrize(
    ("opcode", "data"),
    [
        ("STACK_GLOBAL", b"\x80\x02X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93."),
        ("INST", b"(X\x02\x00\x00\x00idiposix\nsystem\n."),
        ("OBJ", b"(cposix\nsystem\nX\x02\x00\x00\x00ido."),
        ("EXT1", b"\x80\x02\x82\x01."),
        ("NEWOBJ_EX", b"\x80\x04}}}\x92."),
        ("PERSID", b"Pfile\n."),
        ("STRING", b"S'x'\n."),
        ("INT", b"I1\n."),
    ],
)
def test_other_opcodes_are_refused_by_name(opcode, data, tmp_path):
    message = refused(archive(tmp_path / "x.pt", data))
    assert opcode in message or "posix.system" in message  # OBJ comes after its GLOBAL


def test_names_cannot_write_on_the_terminal(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02c\x1b[2Jos\nsystem\n.")
    assert "\x1b" not in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 and then nothing", "cut off"),
        (b"weights and no zip", "no zip archive"),
        (b"<html>404</html>", "a web page. Fetch it again"),
        (b"\n<!DOCTYPE html>", "a web page. Fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    ],
)
def test_files_that_are_no_checkpoint(content, says, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert says in refused(path)


def test_exported_models_are_told_from_checkpoints(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.torchscript.pt")
    assert "it is a TorchScript program. Give the .pt file" in refused(tmp_path / "x.torchscript.pt")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    assert "it is an ONNX model, which cannot be trained. Give the .pt file" in refused(tmp_path / "x.onnx")


def test_missing_legacy_and_other_archives(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refused(tmp_path / "old.pt")
    import tarfile

    with tarfile.open(tmp_path / "tar.pt", "w") as file:
        file.add(tmp_path / "old.pt", "storages")
    assert "before 1.6" in refused(tmp_path / "tar.pt")
    with zipfile.ZipFile(tmp_path / "doc.pt", "w") as file:
        file.writestr("word/document.xml", "<w/>")
    assert "no data.pkl" in refused(tmp_path / "doc.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10**6)
    assert "compressed" in refused(tmp_path / "bomb.pt")


@pytest.fixture
def small(tmp_path):
    """A checkpoint of ours with one 2x3 tensor, and what passes for the head of one class."""
    path = tmp_path / "small.pt"
    values = {"names": ["a"], "num_classes": 1, "imgsz": 64, "recipe": "", "phase": "dense", "epoch": 1}
    state = {"w": torch.arange(6.0).view(2, 3), "model.24.m.0.weight": torch.zeros(18, dtype=torch.uint8)}
    save_checkpoint(path, model_state=state, size="n", metrics={"m": 0.5}, **values)
    return path


def rewrite(path, change):
    with zipfile.ZipFile(path) as file:
        members = {i.filename: file.read(i) for i in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            data = change(name.partition("/")[2], data)
            if data is not None:
                file.writestr(name, data)


SIZE, STRIDE = b"K\x02K\x03\x86", b"K\x03K\x01\x86"  # (2, 3) and (3, 1) in the pickle


@pytest.mark.parametrize(
    ("member", "old", "new", "says"),
    [
        ("data.pkl", SIZE, b"K\x02K\x04\x86", "outside its storage"),
        ("data.pkl", STRIDE, b"K\x04K\x01\x86", "outside its storage"),
        ("data.pkl", STRIDE, b"K\x00K\xff\x86", "outside its storage"),
        ("data.pkl", SIZE, b"K\x02J\xff\xff\xff\xff\x86", "no count"),
        ("data.pkl", SIZE, b"K\x06\x85", "malformed tensor"),
        ("data.pkl", b"FloatStorage", b"DoubleStorage", "24 bytes"),
        ("data.pkl", b"FloatStorage", b"QInt8Storage", "torch.QInt8Storage"),
        ("data.pkl", b"storage", b"sturage", "malformed storage"),
        ("data/0", None, None, "no 'data/0'"),
        ("data/0", bytes(24), b"", "20 bytes"),
        ("byteorder", b"little", b"big", "big-endian"),
    ],
)
def test_tensors_out_of_bounds(small, member, old, new, says):
    seen = []

    def change(name, data):
        if name != member:
            return data
        if new is None:
            seen.append(1)
            return None
        if member == "data/0":
            seen.append(1)
            return data[:20]
        seen.append(data.count(old))
        return data.replace(old, new)

    rewrite(small, change)
    assert seen == [1]
    assert says in refused(small)


def test_repeated_elements_cannot_make_a_small_file_large(small):
    huge = b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"

    def change(name, data):
        return data.replace(SIZE, huge).replace(STRIDE, b"K\x00K\x00\x86") if name == "data.pkl" else data

    rewrite(small, change)
    assert "outside its storage" in refused(small)


def test_a_huge_memo_index_is_refused_before_memory_is_taken(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02Nr\xff\xff\xff\x7f.")
    assert "memo" in refused(path)


def test_a_module_that_contains_itself_is_refused(tmp_path):
    # model._modules = {"a": model}
    model = b"ctorch.nn.modules.container\nSequential\nq\x01)\x81q\x02"
    model += b"}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x02ssb"
    path = archive(tmp_path / "x.pt", b"\x80\x02}X\x05\x00\x00\x00model" + model + b"s.")
    assert "contain each other" in refused(path)


@pytest.mark.parametrize(
    "attack",
    [
        b"cmodels.common\nConv\nN}X\x0c\x00\x00\x00__setstate__Ns\x86b.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(ccollections\nOrderedDict\n)}Ntb.",
    ],
)
def test_what_one_file_sets_does_not_reach_the_next(attack, small, tmp_path):
    # the opcode BUILD sets attributes of what the file was given: stand-ins, and makers of tensor records
    refused(archive(tmp_path / "evil.pt", b"\x80\x02" + attack))
    assert read_checkpoint(small).state_dict["w"].shape == (2, 3)
    assert restricted._rebuild_tensor.__defaults__ is None
    conv = archive(tmp_path / "conv.pt", b"\x80\x02cmodels.common\nConv\n)\x81}X\x01\x00\x00\x00aK\x01sb.")
    with open_restricted(conv) as file:
        assert file.tree.state == {"a": 1}


def test_damage_anywhere_is_one_clear_error_or_harmless(small):
    whole = small.read_bytes()
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        small.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            read_checkpoint(small)
            outcomes["read"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_damaged_pickles_are_one_clear_error_or_harmless(small):
    """As above, but inside an archive whose checksums are right, so that the unpickler sees it."""
    with zipfile.ZipFile(small) as file:
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        whole, numbers = file.read(name), file.read(name.replace("data.pkl", "data/0"))
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        archive(small, bytes(data), _0=numbers, _1=bytes(18))
        try:
            read_checkpoint(small)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_protocols_that_torch_does_not_write_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", pickle.dumps({"model": 1}, protocol=4))
    assert "opcode FRAME" in refused(path)
