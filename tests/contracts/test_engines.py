"""Every engine, in this process and in one of its own, keeps the promises of the Protocol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_exp.config.schema import ENGINES
from sparse_exp.engines import IsolatedEngine, create_engine
from sparse_exp.errors import EngineError, MissingDependency

SIZE, CHANNELS, BATCH = 16, 8, 2


class TinyModel:
    """uint8 (N, 3, 16, 16) -> 1/255 -> 3x3 convolution, stride 2 -> sigmoid -> (N, 64, 8)."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        self.path = path
        self.weight = rng.normal(size=(CHANNELS, 3, 3, 3)).astype(np.float32)
        self.bias = rng.normal(size=CHANNELS).astype(np.float32)
        onnx.save(self._graph(), path)

    def _graph(self) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["float", "scale"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "weight", "bias"], ["maps"], strides=[2, 2], pads=[1] * 4),
            helper.make_node("Sigmoid", ["maps"], ["scores"]),
            helper.make_node("Reshape", ["scores", "shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["output"], perm=[0, 2, 1]),
        ]
        constants = {
            "scale": np.array(1 / 255, np.float32),
            "weight": self.weight,
            "bias": self.bias,
            "shape": np.array([0, CHANNELS, -1]),
        }
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", SIZE**2 // 4, CHANNELS])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)

    def reference(self, images: np.ndarray) -> np.ndarray:
        """The same in NumPy and float64, window by window."""
        padded = np.pad(images / 255, ((0, 0), (0, 0), (1, 1), (1, 1)))
        half = SIZE // 2
        maps = np.empty((len(images), CHANNELS, half, half))
        for row in range(half):
            for column in range(half):
                window = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                maps[:, :, row, column] = np.einsum("nchw,ochw->no", window, self.weight) + self.bias
        return (1 / (1 + np.exp(-maps))).reshape(len(images), CHANNELS, -1).transpose(0, 2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("engines") / "tiny.onnx")


KINDS = [(name, kind) for name in ENGINES for kind in ("here", "isolated")]


@pytest.fixture(scope="module", params=KINDS, ids=" ".join)
def engine(request, model):
    """Loaded for batches of two; tests leave it loaded."""
    name, kind = request.param
    engine = create_engine(name) if kind == "here" else IsolatedEngine(name)
    engine.load(model.path, batch_size=BATCH, cores=1)
    yield engine
    engine.close()


each_isolated = pytest.mark.parametrize(
    "engine", [kind for kind in KINDS if "isolated" in kind], indirect=True, ids=" ".join
)


@pytest.fixture
def isolated(model):
    """One to break: what is tested with it does not depend on the library."""
    engine = IsolatedEngine("onnxruntime")
    engine.load(model.path, batch_size=BATCH, cores=1)
    yield engine
    engine.close()


def some_images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)


def is_one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_output_is_the_reference_for_full_partial_and_several_batches(engine, model, count):
    images = some_images(count)
    outputs = engine.run(images)
    assert len(outputs) == 1
    assert outputs[0].dtype == np.float32
    np.testing.assert_allclose(outputs[0], model.reference(images), atol=1e-5)


def test_outputs_survive_the_next_run(engine, model):
    first = some_images(2, seed=2)
    outputs = engine.run(first)
    engine.run(some_images(2, seed=3))
    np.testing.assert_allclose(outputs[0], model.reference(first), atol=1e-5)


def test_images_need_not_be_contiguous(engine, model):
    images = some_images(4)[::2, :, ::-1]
    np.testing.assert_allclose(engine.run(images)[0], model.reference(images), atol=1e-5)


def test_names_itself_and_its_version(engine):
    assert engine.name in ENGINES
    assert engine.version[0].isdigit()


@pytest.mark.parametrize(
    "images",
    [
        some_images(2).astype(np.float32),
        some_images(2)[0],
        some_images(2)[:, :1],
        some_images(2)[:0],
        some_images(2)[..., :8],
    ],
    ids=["float", "no batch", "grey", "none", "another size"],
)
def test_refuses_other_images_and_stays_usable(engine, model, images):
    with pytest.raises(EngineError, match="image") as error:
        engine.run(images)
    assert is_one_line(error)
    np.testing.assert_allclose(engine.run(some_images(1))[0], model.reference(some_images(1)), atol=1e-5)


@pytest.mark.parametrize("content", [b"not a model", b"", None], ids=["text", "empty", "missing"])
@pytest.mark.parametrize("name", ENGINES)
def test_refuses_a_file_that_is_no_model_and_names_it(name, content, tmp_path):
    path = tmp_path / "wrong.onnx"
    if content is not None:
        path.write_bytes(content)
    engine = create_engine(name)
    with pytest.raises(EngineError, match=r"wrong\.onnx") as error:
        engine.load(path, batch_size=1, cores=1)
    assert is_one_line(error)
    with pytest.raises(EngineError, match="load"):
        engine.run(some_images(1))


def test_an_isolated_refusal_is_the_same_and_leaves_no_child(tmp_path):
    path = tmp_path / "wrong.onnx"
    path.write_text("not a model")
    engine = IsolatedEngine("onnxruntime")
    with pytest.raises(EngineError, match=r"wrong\.onnx") as error:
        engine.load(path, batch_size=1, cores=1)
    assert is_one_line(error)
    assert engine.pid is None


@pytest.mark.parametrize("make", [create_engine, IsolatedEngine])
@pytest.mark.parametrize("name", ENGINES)
def test_use_without_load_and_after_close_is_refused(make, name, model):
    engine = make(name)
    engine.close()
    with pytest.raises(EngineError, match="load"):
        engine.run(some_images(1))
    if name == "onnxruntime":  # the fast one stands for all: closing is shared
        engine.load(model.path, batch_size=1, cores=1)
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="load"):
            engine.run(some_images(1))


@pytest.mark.parametrize("make", [create_engine, IsolatedEngine])
def test_can_be_loaded_again_for_another_batch(make, model):
    engine = make("openvino")
    for batch_size in (1, 3):
        engine.load(model.path, batch_size=batch_size, cores=1)
        np.testing.assert_allclose(engine.run(some_images(3))[0], model.reference(some_images(3)), atol=1e-5)
    engine.close()


def test_unknown_engine_is_refused():
    with pytest.raises(EngineError, match="deepsparse, onnxruntime, openvino"):
        create_engine("tensorrt")


@pytest.mark.parametrize("name", ENGINES)
def test_a_library_that_is_not_installed_is_named_with_what_to_install(name, model, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=f"pip install '{name}[>=]=") as error:
        create_engine(name).load(model.path, batch_size=1, cores=1)
    assert is_one_line(error)


def test_deepsparse_on_a_cpu_without_avx2_is_refused(model, monkeypatch):
    def import_fails(self):
        raise OSError("Unable to determine instruction set 'sse4'")

    monkeypatch.setattr("sparse_exp.engines.deepsparse.DeepSparseEngine._library", import_fails)
    with pytest.raises(EngineError, match="AVX2"):
        create_engine("deepsparse").load(model.path, batch_size=1, cores=1)


@pytest.mark.parametrize("name", ENGINES)
def test_loading_prints_nothing(name, model, capfd):
    engine = create_engine(name)
    engine.load(model.path, batch_size=1, cores=1)
    engine.run(some_images(1))
    engine.close()
    assert capfd.readouterr() == ("", "")


@each_isolated
def test_measure_times_each_batch(engine):
    before = time.perf_counter()
    latencies = engine.measure(some_images(3), 0.05, 0.01)
    elapsed = time.perf_counter() - before
    assert min(latencies) > 0
    assert elapsed >= 0.05
    assert sum(latencies[:-1]) < 0.05  # nothing is started after the time is over ...
    assert sum(latencies) < elapsed  # ... and nothing is counted twice
    assert len(engine.measure(some_images(1), 1e-9)) == 1


@each_isolated
def test_measure_refuses_other_images(engine):
    with pytest.raises(EngineError, match="image"):
        engine.measure(some_images(2).astype(np.float32), 0.01)


@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_child_is_an_error_and_not_a_hang(name, model):
    engine = IsolatedEngine(name)
    engine.load(model.path, batch_size=BATCH, cores=1)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=f"{name} died .signal 9") as error:
        engine.run(some_images(1))
    assert is_one_line(error)
    with pytest.raises(EngineError, match="load"):
        engine.run(some_images(1))


def test_a_child_killed_while_it_measures_is_an_error_and_not_a_hang(isolated):
    threading.Timer(0.3, os.kill, (isolated.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="died"):
        isolated.measure(some_images(1), 60)


def test_an_interrupt_ends_the_child_and_not_just_the_question(model):
    engine = IsolatedEngine("onnxruntime")
    engine.load(model.path, batch_size=1, cores=1)
    pid = engine.pid
    main = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.measure(some_images(1), 60)
    assert not Path(f"/proc/{pid}").exists()


def test_close_ends_the_child(isolated):
    pid = isolated.pid
    isolated.close()
    assert not Path(f"/proc/{pid}").exists()


def modules_of(pid: int) -> set[str]:
    """The site packages whose native code a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split("site-packages/")[1].split("/")[0] for line in lines if "site-packages/" in line}


@each_isolated
def test_the_child_loads_no_torch(engine):
    packages = modules_of(engine.pid)
    assert "numpy" in packages
    assert "torch" not in packages


def test_openvino_leaves_no_trace_of_its_telemetry(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = IsolatedEngine("openvino")
    engine.load(model.path, batch_size=1, cores=1)
    engine.close()
    assert list(tmp_path.iterdir()) == []


# No guard against a second import of the main module; waits for its end in the middle of a measurement.
SCRIPT = """
import sys
import numpy as np
from sparse_exp.engines import IsolatedEngine
engine = IsolatedEngine("onnxruntime")
engine.load(sys.argv[1], batch_size=1, cores=1)
print(engine.pid, flush=True)
engine.measure(np.zeros((1, 3, 16, 16), np.uint8), 60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_child_of_a_script_ends_with_it_and_prints_nothing(end, model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(model.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    ) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        if end == signal.SIGINT:
            os.killpg(parent.pid, end)  # as a terminal does: to the child, too
        else:
            parent.kill()
        _, errors = parent.communicate(timeout=20)
    assert errors.count("Traceback") == (1 if end == signal.SIGINT else 0)  # the script's own
    assert gone(child)


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # dead, and nobody's to reap
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
