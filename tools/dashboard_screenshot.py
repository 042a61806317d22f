"""Take pictures of the dashboard in a real browser: the table of runs, a sweep's page, one of its plots.

    python tools/dashboard_screenshot.py outputs/mlflow docs/images/dashboard.png

writes ``dashboard.png`` (the table, with the newest sweep unfolded), and ``dashboard-run.png`` and
``dashboard-plot.png`` of that sweep. It needs Chromium with its driver, and the package selenium, which is
imported in functions: a test imports this file where selenium may be missing.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sparse_exp.command import Parser, run_command
from sparse_exp.errors import ConfigError, MissingDependency

PATIENCE_S = 60.0  # MLflow's server takes half a minute to start, on a busy machine more
_FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1500,1000",
)  # fmt: skip
_TRAINING = "workflowType=machine_learning"  # or MLflow opens its page for language models
_SWEEP = """
    SELECT r.experiment_id, r.run_uuid FROM runs r JOIN tags t ON t.value = r.run_uuid
    WHERE t.key = 'mlflow.parentRunId' AND r.lifecycle_stage = 'active' ORDER BY r.start_time DESC
"""
_CHILDREN = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?"


def browser_programs() -> tuple[str, str] | None:
    """The paths of Chromium and its driver; None where one is not installed."""
    chromium, driver = (
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    )
    return (chromium, driver) if chromium and driver else None


@contextmanager
def dashboard(store: Path) -> Iterator[str]:
    """Serve MLflow's pages of a store while the block runs; yields their address."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-u", "-m", "sparse_exp.tracking.dashboard", str(store)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        yield re.findall(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@contextmanager
def browser() -> Iterator[Any]:
    """Start a Chromium with an empty profile, driven by selenium.

    Raises:
        MissingDependency: it is not installed.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = browser_programs()
    if programs is None:
        raise MissingDependency("There is no chromium with chromedriver here. Install both.")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for flag in (*_FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=Service(programs[1]))
        try:
            yield driver
        finally:
            driver.quit()


class Pages:
    """MLflow's pages of one experiment.

    Args:
        driver: see `browser`.
        address: see `dashboard`.
        experiment_id: MLflow's name of the experiment.
    """

    def __init__(self, driver: Any, address: str, experiment_id: str) -> None:
        self.driver = driver
        self._experiment = f"{address}/#/experiments/{experiment_id}"

    def open_table(self) -> None:
        """Open the table of the experiment's runs, with sweeps folded."""
        self._open(f"{self._experiment}/runs?{_TRAINING}", "matching run")
        self._close_assistant()

    def unfold(self, run_id: str) -> None:
        """Show the jobs below a sweep in the table."""
        self.find(f"//a[contains(@href, '{run_id}')]/ancestor::div[@role='gridcell'][1]//button").click()

    def open_run(self, run_id: str) -> None:
        """Open the page of a run."""
        self._open(f"{self._experiment}/runs/{run_id}?{_TRAINING}", "About this run")
        self._close_assistant()

    def open_artifact(self, run_id: str, path: str) -> Any:
        """Open the page of a run's artifact; returns the picture that it shows."""
        self._open(f"{self._experiment}/runs/{run_id}/artifacts?{_TRAINING}", "Artifacts")
        self._close_assistant()
        for name in path.split("/"):  # folders, then the file
            self.find(f"//*[normalize-space(text())='{name}']").click()
        return self.find("//img[contains(@src, 'blob:') or contains(@src, 'get-artifact')]")

    def find(self, xpath: str) -> Any:
        """Wait for the first element at ``xpath`` that is shown, and return it."""
        from selenium.webdriver.common.by import By

        def shown(driver: Any) -> Any:
            return next((e for e in driver.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

        return self.wait(shown)

    def wait_for_text(self, text: str) -> Any:
        """Wait until a text stands on the page."""
        return self.wait(lambda _: text in self.text)

    @property
    def text(self) -> str:
        """All text of the page."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait(self, condition: Callable[[Any], Any]) -> Any:
        """Wait until a function of the driver returns a true value; returns the value."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        stale = (StaleElementReferenceException,)
        return WebDriverWait(self.driver, PATIENCE_S, ignored_exceptions=stale).until(condition)

    def save(self, path: Path) -> None:
        """Write the visible part of the page as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))

    def _open(self, address: str, text: str) -> None:
        """Open a page, and wait until the text stands on it."""
        from selenium.common.exceptions import WebDriverException

        def is_loaded(driver: Any) -> bool:
            try:
                driver.get(address)
            except WebDriverException:  # the server has not started yet
                return False
            return True

        self.wait(is_loaded)
        self.wait_for_text(text)

    def _close_assistant(self) -> None:
        """Close the panel of MLflow's assistant, which takes a quarter of the page."""
        from selenium.webdriver.common.by import By

        for button in self.driver.find_elements(By.XPATH, "//button[@aria-label='Close']"):
            if button.is_displayed():
                button.click()


def newest_sweep(store: Path) -> tuple[str, str, list[str]]:
    """The newest run of a store that has children.

    Returns:
        The id of its experiment, its own id, and the ids of its children.

    Raises:
        ConfigError: there is none.
    """
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        found = connection.execute(_SWEEP).fetchone()
        if found is None:
            raise ConfigError(f"There is no sweep in {store}. Make one with python -m sparse_exp -m ...")
        children = [run_id for (run_id,) in connection.execute(_CHILDREN, (found[1],))]
    return str(found[0]), found[1], children


def main() -> int:
    """Write the pictures."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path, help="directory of the local MLflow store")
    parser.add_argument("out", type=Path, help="PNG of the table; the others lie beside it")
    parser.add_argument("--plot", default="compare/compare.png", help="artifact of the sweep (%(default)s)")
    options = parser.parse_args()
    experiment, sweep, children = newest_sweep(options.store)
    out: Path = options.out
    with dashboard(options.store) as address, browser() as driver:
        pages = Pages(driver, address, experiment)
        pages.open_table()
        pages.unfold(sweep)
        pages.find(f"//a[contains(@href, '{children[0]}')]")
        pages.save(out)
        pages.open_run(sweep)
        pages.save(out.with_stem(f"{out.stem}-run"))
        pages.open_artifact(sweep, options.plot)
        pages.save(out.with_stem(f"{out.stem}-plot"))
    return 0


if __name__ == "__main__":
    run_command(main)
