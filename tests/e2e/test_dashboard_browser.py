"""The dashboard in a real browser: a sweep, its jobs, note and plot, and the description's links."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from sparse_exp.config.schema import TrackerConfig
from sparse_exp.tracking import PARENT_TAG, Artifact, Metrics, RunInfo, Tags
from sparse_exp.tracking.description import NOTE_TAG
from sparse_exp.tracking.mlflow import MlflowTracker

ROOT = Path(__file__).parents[2]
SPEED = "benchmark/deepsparse/sparse/b1/items_per_s"
JOBS = {"n-dense": (0.5, 40.0), "s-dense": (0.75, 10.0), "s-quant": (0.625, 20.0)}


def load_tool():
    spec = importlib.util.spec_from_file_location(
        "dashboard_screenshot", ROOT / "tools/dashboard_screenshot.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(tool.browser_programs() is None, reason="needs chromium and chromedriver"),
]


def start(store, directory, name, tags):
    tracker = MlflowTracker(TrackerConfig(system_metrics=False), store)
    tracker.start(RunInfo(name, "sparse_exp", {"recipe": {"name": name}}, tags, directory))
    return tracker


def draw(path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.8), dpi=100)
    axes.plot([1, 2, 3], [3, 1, 2], marker="o")
    figure.savefig(path)
    pyplot.close(figure)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    store, sweep = folder / "mlflow", folder / "sweep"
    draw(sweep / "plots" / "pareto.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        parent = start(store, sweep, "three-jobs", {"sweep": "three-jobs", "sparse_exp.kind": "sweep"})
        for number, (name, (map50, speed)) in enumerate(JOBS.items()):
            tags = {PARENT_TAG: parent.run_id, "sweep": "three-jobs"}
            job = start(store, sweep / f"{number}-{name}", name, tags)
            for epoch in (1, 2, 3):
                job.log(Metrics({"val/map50": map50 * epoch / 3, "loss/box": 1 / epoch}, 100 * epoch))
            job.log(Metrics({"val/map50": map50, SPEED: speed}, 300))
            job.finish("FINISHED")
        note = "## Result\n\n| run | mAP50 | front |\n|---|---|---|\n| s-dense | 0.75 | yes |"
        parent.log(Tags({NOTE_TAG: note}))
        parent.log(Artifact(sweep / "plots"))
        parent.finish("FINISHED")
    return store


@pytest.fixture(scope="module")
def pages(store):
    experiment, _, _ = tool.newest_sweep(store)
    with tool.dashboard(store) as address, tool.browser() as driver:
        yield tool.Pages(driver, address, experiment)


def shown_jobs(pages):
    """Names of the jobs in the table, from top to bottom."""
    return [line for line in pages.text.splitlines() if line in JOBS]


def test_the_jobs_of_a_sweep_are_below_it(pages, store, tmp_path):
    _, sweep, children = tool.newest_sweep(store)
    assert len(children) == 3
    pages.open_table()
    pages.wait_for_text("three-jobs")
    assert shown_jobs(pages) == []
    pages.unfold(sweep)
    for child in children:
        pages.find(f"//a[contains(@href, '{child}')]")
    assert sorted(shown_jobs(pages)) == sorted(JOBS)
    pages.save(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("link", "jobs"),
    [
        ("Most accurate", ["s-dense", "s-quant", "n-dense"]),
        ("Fastest", ["n-dense", "s-quant", "s-dense"]),
        ("Sweeps", []),
        ("Failed", None),
    ],
)
def test_the_links_of_the_description_open_what_they_say(pages, link, jobs):
    pages.open_table()
    address = pages.find(f"//a[normalize-space(.)='{link}']").get_attribute("href")
    pages.driver.get("about:blank")
    pages.driver.get(address)
    if jobs is None:
        pages.wait_for_text("0 matching runs")
    else:
        pages.wait(lambda _: shown_jobs(pages) == jobs and "matching run" in pages.text)
        assert ("three-jobs" in pages.text) == (link == "Sweeps")


def test_the_chart_view_draws_each_metric_of_the_jobs(pages):
    pages.open_table()
    address = pages.find("//a[normalize-space(.)='Charts']").get_attribute("href")
    pages.driver.get("about:blank")
    pages.driver.get(address)
    pages.wait_for_text("3 matching runs")
    pages.find("//*[contains(@class, 'js-plotly-plot')]")


def test_the_page_of_a_sweep_has_its_note_its_jobs_and_its_plot(pages, store):
    _, sweep, _ = tool.newest_sweep(store)
    pages.open_run(sweep)
    cells = pages.wait(lambda _: [cell.text for cell in pages.driver.find_elements("css selector", "td")])
    assert cells[:3] == ["s-dense", "0.75", "yes"]
    assert sorted(name for name in JOBS if f"{name}" in pages.text) == sorted(JOBS)
    picture = pages.open_artifact(sweep, "plots/pareto.png")
    pages.wait(lambda _: picture.get_attribute("naturalWidth") == "640")
