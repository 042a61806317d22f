"""A search without jobs: what is proposed, told, kept in the file and gone on with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus

from hydra_plugins.sparse_exp_search._space import parse_space
from hydra_plugins.sparse_exp_search._study import Objective, Search, SearchJob, open_study
from sparse_exp.errors import ConfigError, StageFailed
from sparse_exp.metrics.pareto import pareto_front

UP, DOWN = Objective("val/map50", less=False), Objective("size/onnx_gzip_mb", less=True)
WORDS = ("model=n,s", "x=interval(0.0,1.0)", "lr=0.1")


def search_in(directory: Path, words=WORDS, objectives=(UP,), *, seed: int = 0, anew: bool = False) -> Search:
    space = parse_space(words, None)  # type: ignore[arg-type]
    return Search(open_study(directory, space, objectives, anew=anew), space, objectives, seed)


def done(value) -> JobReturn:
    returned = JobReturn(status=JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED)
    returned.return_value = value
    return returned


def parameters(job: SearchJob) -> dict[str, str]:
    return dict(word.split("=") for word in job.words)


def value_of(job: SearchJob) -> float:
    """Best, 1, at model=s and x=0.7."""
    point = parameters(job)
    return 1 - (float(point["x"]) - 0.7) ** 2 - 0.3 * (point["model"] == "n")


def run(search: Search, count: int) -> list[list[str]]:
    """Search on, one job at a time; the words of the jobs."""
    jobs = []
    for _ in range(count):
        [job] = search.propose(1)
        assert search.tell(job, done(value_of(job))) == []
        jobs.append(job.words)
    return jobs


@pytest.mark.slow
def test_it_finds_the_best_more_closely_than_chance(tmp_path):
    search = search_in(tmp_path)
    run(search, 24)
    [(_, trial)] = search.best
    assert trial.params["model"] == "s"
    assert trial.values[0] == max(t.values[0] for t in search.trials.values())
    chance = random.Random(0)
    late = [abs(search.trials[i].params["x"] - 0.7) for i in range(12, 24)]
    drawn = [abs(chance.random() - 0.7) for _ in range(12)]
    assert sum(late) < 0.6 * sum(drawn)


def test_a_search_that_stops_goes_on_as_if_it_had_not(tmp_path):
    """Also where a job was running when it stopped: that comes first, with its number and words."""
    undisturbed = run(search_in(tmp_path / "a"), 13)
    first = search_in(tmp_path / "b")
    words = run(first, 6)
    [lost] = first.propose(1)  # killed while this runs
    second = search_in(tmp_path / "b")
    assert second.ended == 6
    [again] = second.unfinished(failed=False)
    assert (again.number, again.words) == (6, lost.words)
    third = search_in(tmp_path / "b")  # killed once more, before it was told
    [again] = third.unfinished(failed=False)
    assert (again.number, again.words) == (6, lost.words)
    third.tell(again, done(value_of(again)))
    assert search_in(tmp_path / "b").unfinished(failed=False) == []
    words += [again.words, *run(search_in(tmp_path / "b"), 6)]
    assert words == undisturbed
    assert list(search_in(tmp_path / "b").trials) == list(range(13))


def test_another_seed_searches_elsewhere(tmp_path):
    assert run(search_in(tmp_path / "a"), 3) != run(search_in(tmp_path / "b", seed=1), 3)


def test_jobs_that_run_at_once_differ(tmp_path):
    search = search_in(tmp_path)
    batch = search.propose(4)
    assert [job.number for job in batch] == [0, 1, 2, 3]
    assert len({tuple(job.words) for job in batch}) == 4
    for job in reversed(batch):  # in whatever order they end
        search.tell(job, done(value_of(job)))
    assert {n: t.values[0] for n, t in search.trials.items()} == {j.number: value_of(j) for j in batch}


def test_a_finite_space_is_tried_point_by_point_and_then_ends(tmp_path):
    search = search_in(tmp_path, ("model=n,s,m", "x=1,2"))
    seen = []
    while batch := search.propose(4):
        assert [job.number for job in batch] == list(range(len(seen), len(seen) + len(batch)))
        seen += [tuple(job.words) for job in batch]
        for job in batch:
            search.tell(job, done(0.5))
    assert sorted(seen) == sorted((f"model={m}", f"x={x}") for m in "nsm" for x in "12")
    assert "All 6 points" in search.summary()
    assert search.propose(0) == search.propose(-3) == []


def test_a_failure_counts_and_may_be_tried_again_under_its_number(tmp_path):
    search = search_in(tmp_path)
    run(search, 2)
    [job] = search.propose(1)
    [error] = search.tell(job, done(StageFailed("The stage train ran out of memory.\nMore.")))
    assert isinstance(error, StageFailed)
    run(search, 1)
    assert search.ended == 4
    later = search_in(tmp_path)
    assert later.unfinished(failed=False) == []
    [again] = later.unfinished(failed=True)
    assert (again.number, again.words) == (2, job.words)
    assert later.ended == 3
    later.tell(again, done(2.0))
    assert later.ended == 4
    assert later.best[0][0] == 2


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.5", (0.5, 0.5), ()])
def test_what_is_no_value_of_the_objectives_is_a_failure(tmp_path, value):
    search = search_in(tmp_path)
    [job] = search.propose(1)
    [error] = search.tell(job, done(value))
    assert "val/map50 of job 0 to be finite numbers" in str(error)
    assert "\n" not in str(error)
    assert search.ended == 1
    assert search.best == []
    assert "none of which finished" in search.summary()


def test_the_front_of_two_objectives(tmp_path):
    search = search_in(tmp_path, objectives=(UP, DOWN))
    chance, points = random.Random(3), []
    for _ in range(16):
        [job] = search.propose(1)
        point = (round(chance.random(), 1), round(chance.random(), 1))  # rounded: some are equal
        points.append(point)
        search.tell(job, done(point))
    ups, downs = zip(*points, strict=True)
    front = pareto_front(ups, downs, x_less=False, y_less=True)  # of the reports, written apart
    assert {number for number, _ in search.best} == {i for i, on in enumerate(front) if on}
    values = [trial.values[0] for _, trial in search.best]
    assert values == sorted(values, reverse=True)


def test_what_is_written(tmp_path):
    search = search_in(tmp_path, objectives=(UP, DOWN))
    for value in ((0.5, 9.0), (0.6, 9.0), ValueError("bad")):
        [job] = search.propose(1)
        search.tell(job, done(value))
    search.write(tmp_path / "search.json")
    written = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
    assert written["objectives"] == {"val/map50": "maximize", "size/onnx_gzip_mb": "minimize"}
    assert written["jobs"] == {"ended": 3, "failed": 1}
    [best] = written["best"]
    assert (best["job"], best["values"]) == (1, {"val/map50": 0.6, "size/onnx_gzip_mb": 9.0})
    assert set(best["parameters"]) == {"model", "x"}
    assert [job["state"] for job in written["all"]] == ["FINISHED", "FINISHED", "FAILED"]
    assert written["all"][2]["failure"] == "bad"
    assert "0.6" in search.summary()


@pytest.mark.parametrize(
    ("words", "objectives", "changed"),
    [
        (("model=n,s,m", *WORDS[1:]), (UP,), "model"),
        (("model=n", *WORDS[1:]), (UP,), "fixed words, model"),
        ((*WORDS, "seed=3"), (UP,), "fixed words"),
        (WORDS, (DOWN,), "objectives"),
        (WORDS, (UP, DOWN), "objectives"),
    ],
)
def test_another_search_does_not_go_on_with_the_study(tmp_path, words, objectives, changed):
    run(search_in(tmp_path), 1)
    with pytest.raises(ConfigError, match=f"another one: {changed} changed.*sweep.name.*rerun=all") as caught:
        search_in(tmp_path, words, objectives)
    assert "\n" not in str(caught.value)
    assert search_in(tmp_path, words, objectives, anew=True).ended == 0


def test_where_it_runs_may_change(tmp_path):
    run(search_in(tmp_path, (*WORDS, "sweep.trials=5")), 2)
    assert search_in(tmp_path, (*WORDS, "launcher=joblib", "tracker=none", "sweep.trials=9")).ended == 2


def test_a_search_anew_leaves_the_former_one_in_the_file(tmp_path):
    import optuna

    before = run(search_in(tmp_path), 3)
    assert run(search_in(tmp_path, anew=True), 3) == before  # with its own beginning
    assert search_in(tmp_path).ended == 3
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 'study.db'}")) == 2


def test_a_file_that_is_no_study(tmp_path):
    (tmp_path / "study.db").write_text("not a database " * 100)
    with pytest.raises(ConfigError, match=r"cannot be used: .* Move the file away") as caught:
        search_in(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = parse_space(WORDS, None)  # type: ignore[arg-type]
    search = Search(open_study(None, space, [UP], anew=False), space, [UP], 0)
    assert len(search.propose(2)) == 2
    assert list(tmp_path.iterdir()) == []
