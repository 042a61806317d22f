from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finished_run import STUB, pruned, save

from sparse_exp.errors import ConfigError
from sparse_exp.files import write_json
from sparse_exp.sources.local import read_metadata
from sparse_exp.zoo.__main__ import main
from sparse_exp.zoo.checksums import write_sums


@pytest.fixture
def zoo(published_model, tmp_path) -> Path:
    """A zoo of one's own with the published model in it."""
    copy = tmp_path / "zoo" / STUB.removeprefix("zoo:")
    shutil.copytree(published_model.directory, copy)
    return tmp_path / "zoo"


@pytest.fixture
def run(zoo, capsys):
    """Run a command on that zoo; its exit code and what it printed."""

    def command(name: str, *words: object) -> tuple[int, str]:
        code = main([name, "--zoo", str(zoo), *map(str, words)])
        return code, capsys.readouterr().out

    return command


def test_list_and_search_name_what_is_there(run):
    code, text = run("list")
    header, row = text.splitlines()
    assert code == 0
    assert " ".join(header.split()) == "size data set px zeros 8 bit mAP50 ONNX MB published stub"
    assert row.split()[:4] == ["n", "digits", "64", "75.0%"]
    assert row.split()[-1] == STUB  # whole, however narrow the terminal
    assert STUB in run("search", "size=n sparsity>=0.7 quantized")[1]
    assert STUB in run("search", "size=n", "sparsity", ">=", "70%")[1]  # not quoted as one
    assert "fits" in run("search", "size=s")[1]
    assert run("search", "size=s", "--json") == (0, "[]\n")


def test_json_is_what_the_model_says(run, zoo):
    (listed,) = json.loads(run("list", "--json")[1])
    shown = json.loads(run("show", "zoo:yolov5-n-digits-pruned75_quant", "--json")[1])
    directory = zoo / STUB.removeprefix("zoo:")
    assert listed == shown == {**read_metadata(directory), "directory": str(directory)}
    assert run("show", directory)[1] == run("show", STUB)[1]
    assert "YOLOv5n, 10 classes, 64 px" in run("show", STUB)[1]


@pytest.mark.parametrize("name", [STUB.replace("75", "85"), "nowhere", "zoo:mine"])
def test_what_is_not_there_is_one_line(run, name):
    with pytest.raises(ConfigError) as raised:
        run("show", name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def only_hashes(monkeypatch):
    for check in ("_checkpoint", "_onnx", "_samples"):
        monkeypatch.setattr(f"sparse_exp.zoo.verify.{check}", lambda *_: iter(()))


def test_a_good_model_is_good(run, published_model, only_hashes):
    # By its directory, outside the zoo; with all checks: test_what_a_published_run_holds.
    assert run("verify", published_model.directory) == (0, f"good    {STUB}\n")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["training/model.pt", "model.onnx", "recipe.md", "sample-inputs/inp-0000.npz"]
)
def test_one_bit_is_found(run, zoo, name, only_hashes):
    _flip(zoo / STUB.removeprefix("zoo:") / name)
    assert run("verify") == (1, f"differs {STUB}\n        {name} was changed\n")


def test_missing_and_foreign_files_are_found(run, zoo, only_hashes):
    directory = zoo / STUB.removeprefix("zoo:")
    (directory / "model.md").unlink()
    (directory / "notes.txt").write_text("mine")
    code, text = run("verify", STUB)
    assert code == 1
    assert "model.md is missing" in text
    assert "notes.txt is not in SHA256SUMS" in text


def test_promises_are_held_against_the_files_even_where_the_hashes_agree(run, zoo, digits):
    """Somebody who changes a model and writes its hashes anew is found out all the same."""
    directory = zoo / STUB.removeprefix("zoo:")
    other = save(zoo / "other.pt", pruned(digits.names, 0.5), digits.names, phase="pruned")
    other.replace(directory / "training/model.pt")
    shutil.copyfile(directory / "deployment/model.qdq.onnx", directory / "model.onnx")
    metadata = read_metadata(directory)
    metadata["metrics"]["sparsity/onnx"] = 0.9
    del metadata["samples"]["deepsparse"]  # one engine is enough, and the quicker one
    write_json(directory / "model.json", metadata)
    for path in directory.glob("sample-outputs_*/out-0000.npz"):
        np.savez(path, predictions=np.full_like(np.load(path)["predictions"], 0.5))
    write_sums(directory)
    code, text = run("verify")
    assert code == 1
    assert "training/model.pt has 50.00% zeros, and model.json says 75.0" in text
    assert "training/model.pt has quantized False, and model.json says True" in text
    assert "model.onnx has 75." in text
    assert "and model.json says 90.00%" in text
    assert "sample-outputs_onnxruntime is not what onnxruntime gives: box_mean_px" in text


def test_a_damaged_model_is_told_not_thrown(run, zoo):
    directory = zoo / STUB.removeprefix("zoo:")
    (directory / "training/model.pt").write_bytes(b"noise")
    (directory / "model.onnx").write_bytes(b"noise")
    for path in directory.glob("sample-inputs/*.npz"):
        path.write_bytes(b"noise")
    code, text = run("verify")
    assert code == 1
    assert "Traceback" not in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_publish_and_import(run, zoo, finished_run, tmp_path, digits, monkeypatch):
    monkeypatch.setattr("sparse_exp.zoo.samples._ENGINES", ("onnxruntime",))  # the quicker one
    with pytest.raises(ConfigError, match="is published already"):
        run("publish", finished_run, "--as", STUB)
    code, text = run("publish", finished_run, "--as", "zoo:yolov5-n-digits-again")
    assert (code, text.splitlines()[0]) == (
        0,
        "Published zoo:cv/detection/yolov5-n/pytorch/sparse_exp/digits/again-none",
    )
    again = json.loads(run("show", "zoo:yolov5-n-digits-again", "--json")[1])
    assert again["samples"] == {"onnxruntime": "sample-outputs"}  # not named after it where it is alone
    file = save(tmp_path / "mine.pt", pruned(digits.names, 0.5), digits.names, phase="pruned")
    assert "/mine/pruned50-none" in run("import", file)[1]
    with pytest.raises(ConfigError, match="published already"):
        run("import", file)
    assert run("import", file, "--force")[0] == 0
    with pytest.raises(ConfigError, match="an existing path"):
        run("import", tmp_path / "nowhere")
    assert len(json.loads(run("list", "--json")[1])) == 3


def test_reading_needs_neither_torch_nor_a_zoo(tmp_path):
    code = (
        "import sys; from sparse_exp.zoo.__main__ import main;"
        "main(['list']); main(['search', 'size=s']); print('torch' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False False"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        (["--help"], 0, "publish"),
        (["search", "--help"], 0, "sparsity"),
        ([], 1, "COMMAND"),
        (["search", "size>s"], 1, "Error: Expected the term of the search"),
        (["publish", "nowhere"], 1, "Error: Expected RUN to be the directory of a run"),
        (["import", "nowhere"], 1, "Error: Expected what to import"),
        (["show", STUB], 1, "Error: Expected the model to be one that is published"),
    ],
)
def test_how_the_command_ends(tmp_path, words, code, fragment):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_exp.zoo", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert fragment in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_zoo_that_cannot_be_written_is_one_line(tmp_path, finished_run):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ConfigError, match="Expected the local zoo to be a directory that you can write"):
        main(["publish", str(finished_run), "--zoo", str(tmp_path / "file" / "zoo")])


@pytest.mark.parametrize(
    "damage", ['{"format": "sparse_exp.zoo/1"', "[" * 100_000, "no size", "a text for metrics"]
)
def test_a_damaged_model_is_left_out_with_a_warning_and_the_others_are_listed(run, zoo, caplog, damage):
    good = zoo / STUB.removeprefix("zoo:")
    bad = good.with_name("damaged-none")
    shutil.copytree(good, bad)
    metadata = read_metadata(good)
    if damage == "no size":
        damage = json.dumps({key: value for key, value in metadata.items() if key != "size"})
    elif damage == "a text for metrics":
        damage = json.dumps({**metadata, "metrics": "none"})
    (bad / "model.json").write_text(damage)
    for words in (["list"], ["search", "size=n map50>0.1"], ["list", "--json"]):
        code, text = run(*words)
        assert code == 0
        assert STUB in text
        assert "damaged-none" not in text
    assert f"{bad} is left out: its model.json lacks" in caplog.text
    with pytest.raises(ConfigError):
        run("show", bad)
