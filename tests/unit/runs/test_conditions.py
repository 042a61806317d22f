import pytest

from sparse_exp.runs import conditions
from sparse_exp.runs.conditions import (
    NOT_RECORDED,
    Difference,
    code_differences,
    code_facts,
    host_differences,
    host_record,
    package_differences,
    packages,
)


def test_nothing_differs_from_now():
    assert list(code_differences(code_facts())) == []
    assert list(host_differences(host_record())) == []
    assert list(package_differences(packages())) == []


def facts(monkeypatch, **values):
    monkeypatch.setattr(conditions, "code_facts", lambda: values)


def test_the_same_sources_are_the_same_code(monkeypatch):
    facts(monkeypatch, version="1", sources="aa", commit="new", dirty="true")
    assert list(code_differences({"version": "1", "sources": "aa", "commit": "old", "dirty": "false"})) == []


def test_other_sources_are_named_with_what_is_known(monkeypatch):
    facts(monkeypatch, version="2", sources="bb", commit="new", dirty="true")
    assert list(code_differences({"version": "1", "sources": "aa", "commit": "old"})) == [
        Difference("code", "version", "1", "2"),
        Difference("code", "commit", "old", "new"),
        Difference("code", "sources", "aa", "bb"),
        Difference("code", "uncommitted changes", NOT_RECORDED, "yes"),
    ]


@pytest.mark.parametrize(
    ("then", "now", "same"), [("false", "false", True), ("true", "true", False), ("false", "true", False)]
)
def test_without_a_digest_the_same_commit_counts_only_where_it_is_clean(monkeypatch, then, now, same):
    facts(monkeypatch, version="1", sources="aa", commit="c", dirty=now)
    found = list(code_differences({"version": "1", "commit": "c", "dirty": then}))
    assert (found == []) is same


def test_the_digest_follows_the_sources(monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "sub" / "b.py").write_text("y = 1")
    monkeypatch.setattr(conditions, "_PACKAGE", tmp_path)
    first = code_facts()["sources"]
    assert code_facts()["sources"] == first
    (tmp_path / "sub" / "b.py").write_text("y = 2")
    second = code_facts()["sources"]
    (tmp_path / "sub" / "b.py").rename(tmp_path / "sub" / "c.py")
    assert len({first, second, code_facts()["sources"]}) == 3


def test_packages_by_what_happened_to_them():
    then = ["python==3.11.7", "Torch==2.5", "ruamel.yaml==1", "gone==1", "twice==1", "twice==2"]
    now = ["python==3.11.8", "torch==2.5", "ruamel-yaml==2", "new==1", "newer==3", "twice==2"]
    assert list(package_differences(then, now)) == [
        Difference("packages", "python", "3.11.7", "3.11.8"),
        Difference("packages", "ruamel-yaml", "1", "2"),
        Difference("packages", "no longer installed", "gone", "-"),
        Difference("packages", "installed since", "-", "new, newer"),
    ]
    assert [found.then for found in package_differences([], now)] == [NOT_RECORDED]


def test_host_facts_that_changed():
    then = {**host_record(), "cpu": "Z80", "usable_cores": 1000}
    assert {(found.what, found.then) for found in host_differences(then)} == {
        ("cpu", "Z80"),
        ("usable_cores", "1000"),
    }
    assert [(found.what, found.then) for found in host_differences({})] == [("cpu", NOT_RECORDED)]
