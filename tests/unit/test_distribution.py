"""What is handed on with the package: wheel, source distribution, container."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, distributions, install, installed

__all__ = ["distributions", "installed"]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TINY = [
    "experiment=smoke", "stages=[fetch,plan,train,export]", "dataset.imgsz=64", "tracker=none",
    "recipe.variables.num_epochs=1", "hardware.engines=[onnxruntime]",
]  # fmt: skip
# Of the repository, what is for those who work on it alone.
AT_HOME = {".ci/run", "outputs/.gitkeep", ".gitignore", ".pre-commit-config.yaml"}


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_wheel_holds_all_of_conf_but_the_settings_of_this_machine():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = {path.name for path in (ROOT / "conf").iterdir()} - {"local"}
    assert included == {f"conf/{name}": f"sparse_exp/conf/{name}" for name in names}


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_directory(installed, tmp_path):
    variables = {"PYTHONPATH": str(installed), "SPARSE_EXP_CACHE": str(tmp_path / "cache")}
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, installed / "bin" / "sparse-exp", *TINY], cwd=tmp_path / "empty",
        env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "empty").glob("outputs/runs/*/*")
    assert json.loads((run / "manifest.json").read_text())["status"] == "FINISHED"
    assert (run / "deployment" / "model.onnx").is_file()
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["outputs"]


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository_and_makes_the_same_wheel(distributions, tmp_path):
    (sdist,), (wheel,) = distributions.glob("*.tar.gz"), distributions.glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
        assert {name for name in listed if (ROOT / name).is_file()} - held <= AT_HOME
    install(sdist, tmp_path)
    from_source = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    own = {name for name in from_source if name.startswith(("sparse_exp/", "hydra_plugins/"))}
    assert {name for name in own if "__pycache__" not in name} == names_in(wheel)


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, in their order: the word, and what follows it."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def copied(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """Where each file or folder of the repository goes to in the container."""
    lists = [rest.split() for word, rest in instructions if word == "COPY"]
    return {source: target for *sources, target in lists for source in sources}


def test_the_container_is_made_from_a_fixed_slim_python_for_a_user_who_is_not_root(instructions):
    words = [word for word, _ in instructions]
    assert words.count("FROM") == 1
    base = re.fullmatch(r"python:(3\.\d+)-slim", instructions[0][1])
    versions = "".join(line for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line)
    assert base[1] in versions
    assert instructions[words.index("USER")][1] not in ("root", "0")
    assert words.index("USER") < words.index("ENTRYPOINT")
    (command,) = json.loads(instructions[words.index("ENTRYPOINT")][1])
    assert command in PROJECT["project"]["scripts"]


def test_the_container_gets_what_there_is_and_pinned_cpu_wheels(instructions):
    for source in copied(instructions):
        assert (ROOT / source).exists(), source
        assert "*" not in source
    (commands,) = [shlex.split(rest) for word, rest in instructions if word == "RUN"]
    assert commands[commands.index("--constraint") + 1].endswith("/constraints.txt")
    assert commands[commands.index("--extra-index-url") + 1].endswith("/cpu")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert [path for path in ("conf/local", ".venv", "outputs") if not matched(path, ignored)] == []


def matched(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


@pytest.mark.slow
def test_what_is_copied_into_the_container_is_enough_to_install_the_package(
    instructions, distributions, tmp_path
):
    context = tmp_path / "opt"
    for source, target in copied(instructions).items():
        place = context / target.removeprefix("/opt/sparse-exp").strip("/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__", "local"))
        else:
            place.mkdir(exist_ok=True, parents=True)
            shutil.copy(ROOT / source, place)
    install(context, tmp_path / "there")
    (wheel,) = distributions.glob("*.whl")
    assert [name for name in names_in(wheel) if not (tmp_path / "there" / name).is_file()] == []
