"""What travels to the process of DeepSparse, and what happens when it ends."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from available import needs

from sparse_exp.children import start_process
from sparse_exp.engines import deepsparse, deepsparse_worker, timing
from sparse_exp.engines.deepsparse_worker import Channel
from sparse_exp.engines.process import EngineProcess
from sparse_exp.errors import EngineError
from sparse_exp.hardware.deepsparse import find_deepsparse

WORKER = Path(deepsparse_worker.__file__)
# Sends back what it gets: the message with the version of NumPy, and each array once more, made there anew.
ECHO = """
import importlib.util, sys
from multiprocessing.connection import Connection
import numpy as np
spec = importlib.util.spec_from_file_location("worker", sys.argv[2])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
channel = worker.Channel(Connection(int(sys.argv[1])), int(sys.argv[3]))
while True:
    try:
        message, arrays = channel.receive()
    except EOFError:
        break
    own = all(array.dtype is np.dtype(array.dtype.name) for array in arrays)
    channel.send((message, np.__version__, own), [array * np.ones_like(array) for array in arrays])
"""
PYTHONS = [
    pytest.param(lambda: sys.executable, id="this"),
    pytest.param(lambda: find_deepsparse().python, id="deepsparse's", marks=needs("deepsparse")),
]


@pytest.fixture(params=PYTHONS)
def echo(request):
    """A process that sends back what it gets."""
    memory = os.memfd_create("echo")
    words = str(WORKER), str(memory)
    process, (pipe,), output = start_process([str(request.param()), "-I", "-c", ECHO], *words, files=[memory])
    child = EngineProcess("echo", process, [Channel(pipe, memory)], output)
    yield child
    child.close()


def test_arrays_and_plain_data_travel_between_interpreters_and_versions_of_numpy(echo):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8),
        rng.normal(size=(4, 5)).astype(np.float32)[::2, 1:],  # not contiguous
        np.arange(6).reshape(2, 3),
        rng.normal(size=1_000_000),
    ]
    message = ("run", {"seconds": 0.5, "none": None, "pin": (1, 2)})
    for sent in (arrays[:2], [], arrays, arrays[:1]):  # the memory grows, and is used again
        (back, version, own), returned = echo.talk(
            lambda one, sent=sent: (one.send(message, sent), one.receive())[1]
        )
        assert back == message
        assert version[0] in "12"
        assert own  # DeepSparse compares dtypes by identity
        for array, one in zip(sent, returned, strict=True):
            assert one.dtype == array.dtype
            np.testing.assert_array_equal(one, array)
    kept = returned[0].copy()
    echo.talk(lambda one: (one.send(message, [arrays[0] + 1]), one.receive())[1])
    np.testing.assert_array_equal(returned[0], kept)  # what was received is the receiver's


def test_the_end_of_the_process_is_an_error_with_what_it_said():
    process, pipes, output = start_process([sys.executable, "-c", "raise SystemExit('no such luck')"])
    child = EngineProcess("mine", process, pipes, output)
    with pytest.raises(EngineError, match=r"engine mine died \(exit code 1, it said: no such luck\)"):
        child.talk(lambda pipe: pipe.recv())
    with pytest.raises(EngineError, match="load"):
        child.talk(lambda pipe: pipe.recv())
    child.close()


def test_what_runs_elsewhere_imports_the_standard_library_and_numpy_only():
    for file in (WORKER, Path(timing.__file__)):
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))
        found = {name.split(".")[0] for node in ast.walk(tree) for name in _imported(node)}
        assert found - {"numpy", "deepsparse"} <= sys.stdlib_module_names, file


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) else []


@pytest.fixture
def stub_library(tmp_path, monkeypatch):
    """A function of the text of a ``deepsparse`` of our own, which the worker finds."""

    def make(text: str) -> None:
        (tmp_path / "deepsparse.py").write_text(text)
        code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv.pop(0); " + (
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{code}" "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(deepsparse, "require_python", lambda: python)

    return make


ENGINE = """
import threading
import numpy as np
__version__ = "9.9"
together = threading.Barrier(2, timeout=20)
class Engine:
    fraction_of_supported_ops = 0.5
    def __init__(self, model, batch_size, num_cores, num_streams, scheduler):
        self.streams, self.calls = num_streams, 0
    def run(self, inputs):
        self.calls += 1
        if self.streams == 2 and self.calls <= 2:
            together.wait()  # both run at once, or neither ends
        return [inputs[0].astype(np.float32).reshape(len(inputs[0]), -1)]
"""


@pytest.fixture
def model(tmp_path) -> Path:
    """The file of a detector; our library does not read it."""
    import onnx
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, 32, 32])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 4, 8])
    graph = helper.make_graph([], "none", [images], [output])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


IMAGES = np.ones((1, 3, 32, 32), np.uint8)


def test_streams_run_at_once(stub_library, model):
    stub_library(ENGINE)
    engine = deepsparse.DeepSparseEngine()
    engine.load(model, batch_size=1, cores=2, streams=2)
    threads = [threading.Thread(target=engine.run, args=(IMAGES,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert engine.version == "9.9"
    assert len(engine.measure(IMAGES, 0.01, streams=2).latencies) >= 2
    engine.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_there", r"deepsparse to be installed, but got .*not_there.*anew"),
        ("raise OSError('no AVX2')", r"CPU for deepsparse to be .*no AVX2"),
        ("import os; os._exit(3)", r"deepsparse died \(exit code 3\)"),
        ("__version__ = '1'\ndef Engine(**_): raise ValueError('odd')", r"deepsparse cannot compile .*odd"),
    ],
)
def test_a_library_that_fails_is_told_in_one_line_and_leaves_no_process(stub_library, model, text, message):
    stub_library(text)
    engine = deepsparse.DeepSparseEngine()
    with pytest.raises(Exception, match=message) as error:
        engine.load(model, batch_size=1, cores=1)
    assert "\n" not in str(error.value)
    assert engine.pid is None


def test_a_killed_process_is_an_error_and_not_a_hang(stub_library, model):
    stub_library(ENGINE)
    engine = deepsparse.DeepSparseEngine()
    engine.load(model, batch_size=1, cores=1)
    os.kill(engine.pid, signal.SIGKILL)
    for do in (lambda: engine.run(IMAGES), lambda: engine.measure(IMAGES, 1.0)):
        with pytest.raises(EngineError, match=r"died|load"):
            do()
    engine.close()


def test_the_process_ends_with_this_one(stub_library, tmp_path):
    stub_library(ENGINE)
    code = (
        "import os, sys; from sparse_exp.children import start_process\n"
        "memory = os.memfd_create('x')\n"
        "process, *_ = start_process(sys.argv[1:], str(memory), '', files=[memory])\n"
        "print(process.pid, flush=True); os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "python"), "-I", str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except OSError:
            return
        threading.Event().wait(0.05)
    pytest.fail("it goes on")
