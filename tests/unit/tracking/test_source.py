import subprocess

import pytest

import sparse_exp
from sparse_exp.tracking.source import source_tags


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-b", "trunk")
    return package


def test_the_commit_and_whether_files_were_changed_since(package):
    git(package, "add", ".")
    git(package, "commit", "-m", "first")
    tags = source_tags(package)
    assert tags["mlflow.source.git.commit"] == git(package, "rev-parse", "HEAD")
    assert (tags["mlflow.source.git.branch"], tags["git.dirty"]) == ("trunk", "false")
    assert tags["version"] == sparse_exp.__version__
    (package / "__init__.py").write_text("x = 1")
    assert source_tags(package)["git.dirty"] == "true"


def test_a_repository_that_does_not_track_the_package_is_not_its_source(package):
    (package.parent / "other.txt").write_text("")
    git(package.parent, "add", "other.txt")
    git(package.parent, "commit", "-m", "first")
    assert not [key for key in source_tags(package) if "git" in key]


def test_without_a_repository_or_git_the_commit_is_left_out(tmp_path, monkeypatch):
    assert not [key for key in source_tags(tmp_path) if "git" in key]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not [key for key in source_tags() if "git" in key]
