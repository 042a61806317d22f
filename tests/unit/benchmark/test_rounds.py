"""The measurement with engines that answer at once; those of the contracts run real ones."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_exp.benchmark import Cell, Load, benchmark, rounds
from sparse_exp.benchmark.host_state import HostState
from sparse_exp.benchmark.ratios import ratio_of_rows
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.engines.timing import Timing
from sparse_exp.errors import EngineError, MissingDependency

IMAGES = np.zeros((3, 3, 32, 32), np.uint8)
QUIET = HostState(0.1, 0.0, 2000.0, 0.0)
PROTOCOL = {
    "repeats": 2, "warmup_s": 0.5, "max_warmup_s": 3.0, "duration_s": 2.0, "tune": False, "budget_s": 0.0,
    "precision": 10.0,
}  # fmt: skip


class Lab:
    """Stands for `IsolatedEngine`: writes down what is asked of engines, whose speed follows a script."""

    def __init__(self):
        self.log, self.speeds, self.broken = [], {}, {}
        self.space, self.loaded, self.most, self.settings = [{}], set(), 0, []
        self.stable = {"until stable": True, "for a while": True}

    def engine(self, name):
        lab = self

        class Engine:
            version = ""
            pid = 1

            def load(self, model, *, batch_size, cores, streams, options, pin):
                if model.name in lab.broken:
                    raise lab.broken[model.name]
                self.version, self.model = "1.2.3", model.name
                lab.loaded.add(self)
                lab.most = max(lab.most, len(lab.loaded))
                lab.settings.append((batch_size, cores, streams, options, pin))
                lab.log.append(("load", self.model))

            def measure(self, images, seconds, *, warmup, max_warmup=None, streams=1):
                lab.log.append(("measure", self.model, seconds, warmup, max_warmup, streams))
                script = lab.speeds.get(self.model, [0.5])
                latency = script.pop(0) if len(script) > 1 else script[0]
                if isinstance(latency, Exception):
                    raise latency
                latency, waited = latency if isinstance(latency, tuple) else (latency, 0.0)
                stable = lab.stable["for a while" if max_warmup is None else "until stable"]
                return Timing((latency,) * 4, 4 * latency, warmup, stable, waited)

            def run(self, images):
                lab.log.append(("run", self.model))
                return [np.full((len(images), 1, 6), 0.5, np.float32)]

            def peak_rss_mb(self):
                return 100.0 + len([what for what in lab.log if what[0] == "measure"])

            def close(self):
                lab.loaded.discard(self)
                lab.log.append(("close", self.model))

        return Engine()

    def measured(self):
        return [entry[1] for entry in self.log if entry[0] == "measure"]


@pytest.fixture
def lab(monkeypatch):
    lab = Lab()
    monkeypatch.setattr(rounds, "IsolatedEngine", lab.engine)
    monkeypatch.setattr(rounds, "search_space", lambda name, **_: lab.space)
    monkeypatch.setattr(rounds, "look_around", lambda: QUIET)
    monkeypatch.setattr(rounds, "physical_cpus", lambda: [0, 2, 4, 6])
    monkeypatch.setattr(rounds, "free_cpus", lambda cpus, count: [2, 6])
    monkeypatch.setattr(rounds, "free_memory_share", lambda: 1.0)
    for watch in ("Steal", "Throttling"):  # the host that the test runs on is disturbed
        monkeypatch.setattr(rounds, watch, lambda: SimpleNamespace(share=lambda: 0.0))
    return lab


def cell(model, batch=1, engine="openvino", **more):
    load = Load(f"b{batch}", "sync", batch, 1, 2)
    return Cell(engine, "dense", Path(model), load, **more)


@pytest.fixture
def measure(lab, tmp_path):
    def run(*cells, **changes):
        hardware = HardwareConfig("x", **{**PROTOCOL, **changes})
        return benchmark(cells, IMAGES, hardware=hardware, lock_path=tmp_path / "lock")

    return run


def test_cells_are_all_loaded_then_measured_in_turns_then_closed(lab, measure):
    lab.speeds = {"a": [0.5], "b": [0.25]}
    first, second = measure(cell("a"), cell("b", batch=2, engine="deepsparse"))
    until_stable, then = (2.0, 0.5, 3.0, 1), (2.0, 0.5, None, 1)
    assert lab.log == [
        ("load", "a"), ("run", "a"), ("load", "b"), ("run", "b"),
        ("measure", "a", *until_stable), ("measure", "b", *until_stable),
        ("measure", "b", *then), ("measure", "a", *then),  # each turn begins with another
        ("close", "a"), ("close", "b"),
    ]  # fmt: skip
    assert first.numbers()["items_per_s"] == pytest.approx(2)
    assert second.numbers()["items_per_s"] == pytest.approx(8)
    assert lab.settings == [(1, 2, 1, {}, [2, 6]), (2, 2, 1, {}, [2, 6])]


def test_without_pinning_an_engine_may_run_anywhere(lab, measure):
    measure(cell("a"), pinning=False)
    assert lab.settings[0][-1] is None


def test_the_setting_that_the_search_found_is_measured_and_recorded(lab, measure):
    in_turns = [0.5, *[0.1, 0.5] * 3, *[0.5, 0.1] * 5]
    lab.space, lab.speeds = [{}, {"fast": True}], {"a": [*in_turns, 0.2]}
    (found,) = measure(cell("a"), tune=True, repeats=1)
    row = found.row()
    assert row["options"] == {"fast": True}
    assert [one["latency_p50_ms"] for one in row["tries"]] == [500.0, 100.0]
    assert row["each"] == pytest.approx([5.0])
    assert row["streams"] == 1


def test_a_batch_in_the_setting_that_is_measured_is_looked_at_first(lab, tmp_path, caplog):
    seen = []

    def check(cell, outputs):
        seen.append((cell.name, outputs.shape))
        if cell.model.name == "b":
            raise EngineError("It puts out something else.")
        return {"score_mean": 0.001}

    hardware = HardwareConfig("x", **PROTOCOL)
    cells = cell("a", batch=2), cell("b", engine="deepsparse")
    right, wrong = benchmark(cells, IMAGES, hardware=hardware, check=check, lock_path=tmp_path / "lock")
    assert seen == [("openvino/dense/b2", (2, 1, 6)), ("deepsparse/dense/b1", (1, 1, 6))]
    assert right.row()["outputs"] == {"score_mean": 0.001}
    assert lab.measured() == ["a", "a"]
    assert wrong.row()["impossible"] == "It puts out something else."
    assert "deepsparse/dense/b1 is not measured: It puts out something else." in caplog.text
    assert not lab.loaded


@pytest.fixture
def searched(lab, tmp_path):
    """Benchmarks that keep the settings which they find, of a file of its own; returns the row."""
    (tmp_path / "a").write_bytes(b"weights")

    def run(speeds, *, images=IMAGES, **changes):
        lab.log.clear()
        lab.speeds = {"a": list(speeds)}
        hardware = HardwareConfig("x", **{**PROTOCOL, "tune": True, "repeats": 1, **changes})
        folders = {"lock_path": tmp_path / "lock", "settings": tmp_path / "settings"}
        (found,) = benchmark([cell(tmp_path / "a")], images, hardware=hardware, **folders)
        return found.row()

    lab.space = [{}, {"fast": True}]
    return run


SEARCH = [0.5, *[0.1, 0.5] * 3, *[0.5, 0.1] * 5, 0.2]


def test_a_setting_that_was_found_before_is_not_searched_for_again(lab, searched):
    first = searched(SEARCH)
    again = searched([0.2])
    assert lab.measured() == ["a"]
    assert again["options"] == first["options"] == {"fast": True}
    assert again["tries"] == first["tries"]
    assert "searched" not in first
    assert datetime.fromisoformat(again["searched"])


@pytest.mark.parametrize(
    "changes", [{"tune_again": True}, {"tune_s": 2.5}, {"images": np.zeros((3, 3, 64, 64), np.uint8)}]
)
def test_a_setting_is_searched_for_again_where_it_is_asked_for_or_something_else_is_measured(
    lab, searched, changes
):
    searched(SEARCH)
    searched(SEARCH, **changes)
    assert len(lab.measured()) == len(SEARCH)


def test_a_setting_of_another_version_of_the_engine_does_not_count(lab, searched, tmp_path):
    searched(SEARCH)
    (kept,) = (tmp_path / "settings").iterdir()
    kept.write_text(kept.read_text().replace("1.2.3", "1.2.2"))
    searched(SEARCH)
    assert len(lab.measured()) == len(SEARCH)
    assert "1.2.3" in kept.read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"streams": "x", "options": {}}'])
def test_kept_settings_that_cannot_be_read_are_found_anew(lab, searched, tmp_path, content):
    searched(SEARCH)
    (kept,) = (tmp_path / "settings").iterdir()
    kept.write_text(content)
    assert searched(SEARCH)["options"] == {"fast": True}
    assert len(lab.measured()) == len(SEARCH)


def test_where_memory_is_short_an_engine_is_loaded_for_each_turn_and_warmed_anew(lab, measure, monkeypatch):
    monkeypatch.setattr(rounds, "free_memory_share", lambda: 0.1)
    measure(cell("a"), cell("b"))
    assert lab.most == 1
    assert [entry[4] for entry in lab.log if entry[0] == "measure"] == [3.0] * 4
    assert lab.measured() == ["a", "b", "b", "a"]
    assert not lab.loaded


def test_an_engine_that_takes_its_memory_when_it_runs_is_released_then(lab, measure, monkeypatch):
    monkeypatch.setattr(rounds, "free_memory_share", lambda: 0.1 if lab.measured() else 1.0)
    measure(cell("a"), cell("b"))
    assert [entry for entry in lab.log if entry[0] != "run"][:5] == [
        ("load", "a"), ("load", "b"), ("measure", "a", 2.0, 0.5, 3.0, 1), ("close", "a"), ("close", "b"),
    ]  # fmt: skip
    assert [entry[4] for entry in lab.log if entry[0] == "measure"] == [3.0] * 4  # each in a fresh process


@pytest.mark.parametrize(("which", "expected"), [("until stable", False), ("for a while", True)])
def test_only_a_warm_up_that_goes_on_until_latencies_are_stable_can_fail_to_get_there(
    lab, measure, which, expected
):
    lab.stable[which] = False
    (found,) = measure(cell("a"))
    assert found.row()["stable"] is expected


def test_a_repeat_that_something_disturbed_is_measured_again_and_does_not_count(lab, measure, caplog):
    lab.speeds = {"a": [0.5], "b": [0.4, (0.9, 0.5), (0.8, 0.03), (0.4, 0.02), 0.4]}
    quiet, again = measure(cell("a"), cell("b", batch=2), budget_s=60.0)
    assert lab.measured() == ["a", "b", "b", "b", "b", "a"]
    assert again.row()["each"] == pytest.approx([5.0, 5.0])
    assert again.row()["turns"] == [0, 1]
    assert again.row()["waited"] == 0.02
    assert [one["disturbance"] for one in again.row()["dropped"]] == [0.5, 0.03]
    assert [one["items_per_s"] for one in again.row()["dropped"]] == pytest.approx([2 / 0.9, 2 / 0.8])
    assert not again.noisy
    assert quiet.row()["dropped"] == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_which_repeats_count_is_decided_by_their_disturbance_and_never_by_their_spread(lab, measure):
    even = [(1.0, 0.3), (1.0, 0.3), (1.0, 0.3)]  # slowed down evenly, as by a busy neighbour
    lab.speeds = {"b": [0.5, *even, 0.4, 0.5, 0.6]}
    (found,) = measure(cell("b"), budget_s=60.0, repeats=3)
    assert found.row()["each"] == pytest.approx([2.0, 2.5, 2.0])
    assert found.row()["turns"] == [0, 2, 3]
    assert not found.noisy


def test_where_nothing_is_undisturbed_the_least_disturbed_counts_and_is_marked(lab, measure, caplog):
    lab.speeds = {"b": [(0.9, 0.5), (0.5, 0.1), (0.8, 0.4), (0.8, 0.3), (0.6, 0.2), (0.7, 0.25), (9.0, 0.9)]}
    (noisy,) = measure(cell("b"), budget_s=60.0)
    assert len(lab.measured()) == 6  # of each turn the best of three; two turns are a quick look
    assert noisy.row()["each"] == pytest.approx([2.0, 1 / 0.6])
    assert noisy.row()["noisy"]
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "openvino/dense/b1" in first
    assert "kept engines from running up to 20 %" in second


@pytest.mark.parametrize("seed", range(20))
def test_no_ratio_is_wrong_unmarked_however_repeats_are_disturbed(lab, measure, seed):
    """An engine that is truly 1.5 times as fast, while others take up to four fifths of the CPUs."""
    draw = np.random.default_rng(seed)

    def repeats(latency):
        for _ in range(400):
            waited = draw.uniform(0.03, 0.8) if draw.random() < seed / 20 else draw.uniform(0, 0.01)
            yield latency * draw.normal(1, 0.01) / (1 - waited), waited

    lab.speeds = {"a": list(repeats(0.3)), "b": list(repeats(0.2))}
    protocol = {"repeats": 4, "budget_s": 0.2, "precision": 0.03}
    slow, fast = (one.row() for one in measure(cell("a"), cell("b", engine="deepsparse"), **protocol))
    ratio = ratio_of_rows(fast, slow)
    right = abs(ratio.value / 1.5 - 1) < 0.1
    assert right or fast["noisy"] or slow["noisy"]
    assert not (ratio.high < 1)  # never is the slower one called the winner
    if seed < 8:  # of which most repeats are undisturbed
        assert right


def test_turns_go_on_until_the_ratio_to_the_fastest_dense_network_is_known(lab, measure):
    lab.speeds = {"slow": [1.0], "dense": [0.5], "fast": [0.3, 0.2, 0.25, *[0.25] * 20], "other": [0.1, 0.2]}
    other = replace(cell("other"), variant="sparse", load=Load("b2", "sync", 2, 1, 2))  # has no baseline
    cells = [cell("slow"), cell("dense", engine="torch"), replace(cell("fast"), variant="sparse"), other]
    *_, fast, alone = measure(*cells, precision=0.10, budget_s=60.0, repeats=4)
    turns = lab.measured().count("fast")
    assert 4 < turns < 20
    assert lab.measured().count("dense") == turns  # both in every turn
    assert lab.measured().count("slow") == lab.measured().count("other") == 4
    assert not fast.noisy
    assert not alone.noisy


def test_what_is_not_known_well_enough_when_the_time_is_over_is_noisy(lab, measure, caplog):
    lab.speeds = {"a": [0.5], "b": [0.3, 0.2, 0.25, 0.4]}
    exact, vague = measure(cell("a"), replace(cell("b"), variant="sparse"), precision=0.01, repeats=4)
    assert lab.measured().count("b") == 4
    assert vague.noisy
    assert not exact.noisy
    assert "openvino/sparse/b1" in caplog.text


def test_an_engine_that_dies_in_a_further_turn_keeps_what_it_gave_before(lab, measure, caplog):
    lab.speeds = {"a": [0.5], "b": [0.3, 0.2, 0.4, EngineError("out of memory")]}
    _, vague = measure(
        cell("a"), replace(cell("b"), variant="sparse"), precision=0.01, repeats=3, budget_s=60.0
    )
    assert vague.row()["each"] == pytest.approx([1 / 0.3, 5.0, 2.5])
    assert vague.noisy
    assert lab.measured().count("b") == 4
    assert "cannot be measured again: out of memory" in caplog.text
    assert not lab.loaded


def test_an_engine_that_dies_when_it_is_measured_again_is_impossible(lab, measure):
    lab.speeds = {"b": [0.5, (0.5, 0.9), EngineError("out of memory")]}
    (dead, _) = measure(cell("b"), cell("a"), budget_s=60.0)
    assert dead.row()["impossible"] == "out of memory"


def test_a_cell_that_cannot_be_loaded_says_why_and_the_others_are_measured(lab, measure):
    lab.broken = {"broken": EngineError("operator X is unknown")}
    broken, fine = measure(cell("broken"), cell("a"))
    assert broken.row()["impossible"] == "operator X is unknown"
    assert broken.metrics() == {}
    assert "items_per_s" not in broken.row()
    assert len(fine.rounds) == 2


def test_an_engine_that_dies_in_its_second_turn_is_impossible_and_the_others_go_on(lab, measure):
    lab.speeds = {"a": [0.5, EngineError("out of memory")]}
    dead, fine = measure(cell("a"), cell("b"))
    assert dead.row()["impossible"] == "out of memory"
    assert len(fine.rounds) == 2
    assert not lab.loaded


def test_a_cell_without_a_file_stays_impossible_and_starts_nothing(lab, measure):
    nothing, _ = measure(cell("n", impossible="There is none."), cell("a"))
    assert nothing.row()["impossible"] == "There is none."
    assert set(lab.measured()) == {"a"}


def test_where_nothing_can_be_measured_the_first_reason_ends_it(lab, measure):
    lab.broken = {"a": MissingDependency("install openvino"), "b": EngineError("no")}
    with pytest.raises(MissingDependency, match="install openvino"):
        measure(cell("a"), cell("b"))
    with pytest.raises(EngineError, match=r"nothing to measure: It cannot be\."):
        measure(cell("c", impossible="It cannot be."))
    assert not lab.loaded


def test_a_row_carries_its_conditions(lab, measure):
    (found,) = measure(cell("a"))
    row = found.row()
    assert {name: row[name] for name in ("engine", "variant", "key", "scenario", "batch", "streams", "cores",
                                         "model", "version", "precision", "imgsz", "repeats", "warmup_s",
                                         "duration_s", "peak_rss_mb")} == {
        "engine": "openvino", "variant": "dense", "key": "b1", "scenario": "sync", "batch": 1, "streams": 1,
        "cores": 2, "model": "a", "version": "1.2.3", "precision": "fp32", "imgsz": 32, "repeats": 2,
        "warmup_s": 0.5, "duration_s": 2.0, "peak_rss_mb": 102.0,
    }  # fmt: skip
    assert row["before"] == row["after"] == QUIET.as_dict()
    assert row["lock"].endswith("/lock")
    assert datetime.fromisoformat(row["started"]) <= datetime.fromisoformat(row["ended"])
    assert row["warmed_s"] == [0.5, 0.5]


def test_every_field_of_a_row_is_in_the_documentation(lab, measure):
    rows = [one.row() for one in measure(cell("a", network="n"), cell("c", impossible="It cannot be."))]
    page = (Path(__file__).parents[3] / "docs" / "benchmark.md").read_text()
    table = page.split("| field | meaning |")[1].split("\n\n")[0]
    told = set(re.findall(r"`(\w+)`", table))
    assert {name for row in rows for name in row if not name.startswith("latency_")} <= told


def test_warns_when_other_programs_are_busy(lab, measure, monkeypatch, caplog):
    monkeypatch.setattr(rounds, "look_around", lambda: HostState(2.0, 1.04, None, 0.0))
    measure(cell("a"))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1.0 cores busy" in warning.getMessage()


def test_the_lock_is_held_from_the_first_load_to_the_last_close(lab, measure, tmp_path, monkeypatch):
    held = []
    probe = "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    asked = lab.engine

    def checked(call):
        def checking(*words, **named):
            command = [sys.executable, "-c", probe, tmp_path / "lock"]
            held.append(subprocess.run(command, capture_output=True).returncode != 0)
            return call(*words, **named)

        return checking

    def engine(name):
        made = asked(name)
        for method in ("load", "measure", "close"):
            setattr(made, method, checked(getattr(made, method)))
        return made

    monkeypatch.setattr(rounds, "IsolatedEngine", engine)
    measure(cell("a"), repeats=1)
    assert held == [True] * 3
