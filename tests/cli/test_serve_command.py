"""``python -m sparse_exp.serve``: what it says when it cannot serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from PIL import Image

from sparse_exp.errors import SparseExpError
from sparse_exp.serve.__main__ import main


@pytest.fixture
def fails(monkeypatch, tmp_path):
    """Runs the command in this process; the one line that it ends with."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve", *words])
        with pytest.raises(SparseExpError) as ended:
            main()
        assert "\n" not in str(ended.value)
        return str(ended.value)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_help_is_quick(tmp_path):
    code = (
        "import sys; from sparse_exp.serve.__main__ import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'onnx', 'fastapi', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_port_in_use_is_said_before_anything_is_loaded(fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails("nothing.onnx", "--port", str(port))
    assert f"port {port}: Address already in use" in said
    assert "--port" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--host", ""], "--host"),
        (["--port", "70000"], "70000"),
        (["--port", "x"], "--port"),
        (["--max-wait-ms", "-1"], "--max-wait-ms"),
        (["--max-bytes", "lots"], "--max-bytes"),
        (["--max-bytes", "0"], "a size such as 10MB"),
        (["--max-pixels", "179M"], "178956970"),
        (["--timeout", "0"], "--timeout"),
        (["--engine", "tvm", "--port", "0"], "tvm"),
        (["--port", "0"], "nothing.onnx"),
    ],
)
def test_what_cannot_be_served_is_one_line(fails, words, named):
    assert named in fails("nothing.onnx", *words)


def test_ctrl_c_counts_where_it_was_ignored(fails):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fails("nothing.onnx", "--port", "0")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sizes_have_units():
    from sparse_exp.serve.__main__ import _size

    said = {"7": 7, "500k": 500_000, "10MB": 10_000_000, "1 g".replace(" ", ""): 1_000_000_000}
    assert {text: _size(text) for text in said} == said


def test_no_more_pixels_than_pillow_decodes():
    from sparse_exp.serve.__main__ import MOST_PIXELS

    assert MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_a_model_that_the_engine_cannot_compile_ends_the_service(fails, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 32, 32])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "anchors", 8])
    node = helper.make_node("NoSuchOperator", ["images"], ["output"])
    graph = helper.make_graph([node], "strange", [images], [output])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(tmp_path / "strange.onnx"))
    said = fails("strange.onnx", "--engine", "onnxruntime", "--port", "0", "--cores", "1")
    assert "onnxruntime cannot compile" in said
    assert "NoSuchOperator" in said
