"""One resolver of places: of shipped values, files, environment and what is typed the later wins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sparse_exp.config import places
from sparse_exp.config.places import VARIABLES, find_places
from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.tracking.store import tracking_uri

LOCAL = """# @package _global_
paths: {output: %(name)s/outputs, zoo: %(name)s/zoo, cache: %(name)s/cache}
tracker: {uri: 'http://%(name)s'}
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def conf(monkeypatch, tmp_path) -> Path:
    """A copy of the shipped configuration, to which ``conf/local`` can be added."""
    shutil.copytree(CONF_DIRECTORY, tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    monkeypatch.setattr(places, "CONF_DIRECTORY", tmp_path / "conf")
    return tmp_path / "conf"


def found(**arguments) -> list[str]:
    """The server, and the zoo and the cache relative to the current directory."""
    chosen = find_places(**arguments)
    uri, _ = tracking_uri(chosen.tracker, chosen.mlflow)
    return [uri, str(chosen.zoo.relative_to(Path.cwd())), str(chosen.cache)]


def test_the_later_layer_wins(conf, monkeypatch, tmp_path):
    shipped = [f"sqlite:///{tmp_path}/outputs/mlflow/mlflow.db", "outputs/zoo", "None"]
    assert found() == shipped
    write_text(conf / "local" / "default.yaml", LOCAL % {"name": "local"})
    assert found() == ["http://local", "local/zoo", "local/cache"]
    assert find_places().runs == (Path("local/outputs/runs"), Path("local/outputs/sweeps"))
    (conf / "local" / "default.yaml").unlink()
    write_text(tmp_path / "mine" / "local" / "default.yaml", LOCAL % {"name": "mine"})
    assert found(config_dir="mine") == ["http://mine", "mine/zoo", "mine/cache"]
    for key, variable in VARIABLES.items():
        monkeypatch.setenv(variable, "http://env" if key == "tracker.uri" else "env")
    assert found(config_dir="mine") == ["http://env", "env", "env"]
    typed = {"tracker.uri": "http://typed", "paths.zoo": "typed", "paths.cache": "typed"}
    assert found(config_dir="mine", typed=typed) == ["http://typed", "typed", "typed"]


def test_a_store_that_is_named_is_meant_whatever_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert found(typed={"paths.mlflow": "store"})[0] == f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.mark.parametrize("text", ["paths: [", "# @package _global_\npaths: {outptu: x}\n"])
def test_a_configuration_that_cannot_be_read_is_one_line(conf, text):
    write_text(conf / "local" / "default.yaml", text)
    with pytest.raises(ConfigError) as raised:
        find_places()
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="--config-dir to be a directory, but got 'none'"):
        find_places("none")
