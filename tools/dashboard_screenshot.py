"""Pictures of the dashboard in a real browser: the table of runs, a sweep's page, one of its plots.

    python tools/dashboard_screenshot.py outputs/mlflow docs/images/dashboard.png

writes ``dashboard.png`` (the table, the newest sweep unfolded), and of that sweep ``dashboard-run.png`` and
``dashboard-plot.png``. Needs Chromium with its driver, and the package selenium.
"""

from __future__ import annotations

import argparse
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
    """Paths of Chromium and its driver; None where one is not installed."""
    chromium, driver = (
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    )
    return (chromium, driver) if chromium and driver else None


@contextmanager
def dashboard(store: Path) -> Iterator[str]:
    """The address of MLflow's page over a store, while the block runs."""
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
    """A new Chromium without a past, driven by selenium.

    Raises:
        SystemExit: it is not installed.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = browser_programs()
    if programs is None:
        sys.exit("Error: There is no chromium with chromedriver here. Install both.")
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
        """The runs of the experiment, sweeps folded."""
        self._open(f"{self._experiment}/runs?{_TRAINING}", "matching run")
        self._close_assistant()

    def unfold(self, run_id: str) -> None:
        """Show the jobs below a sweep in the table."""
        self.find(f"//a[contains(@href, '{run_id}')]/ancestor::div[@role='gridcell'][1]//button").click()

    def open_run(self, run_id: str) -> None:
        """The page of a run."""
        self._open(f"{self._experiment}/runs/{run_id}?{_TRAINING}", "About this run")
        self._close_assistant()

    def open_artifact(self, run_id: str, path: str) -> Any:
        """The page of a run's artifact; returns the picture that it shows."""
        self._open(f"{self._experiment}/runs/{run_id}/artifacts?{_TRAINING}", "Artifacts")
        self._close_assistant()
        for name in path.split("/"):  # a folder, and at last the file
            self.find(f"//*[normalize-space(text())='{name}']").click()
        return self.find("//img[contains(@src, 'blob:') or contains(@src, 'get-artifact')]")

    def find(self, xpath: str) -> Any:
        """The first element that is shown there, waited for."""
        from selenium.webdriver.common.by import By

        def shown(driver: Any) -> Any:
            return next((e for e in driver.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

        return self.wait(shown)

    def says(self, text: str) -> Any:
        """Wait until the page says something."""
        return self.wait(lambda _: text in self.text)

    @property
    def text(self) -> str:
        """All that the page says."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait(self, condition: Callable[[Any], Any]) -> Any:
        """Wait until a condition of the driver holds; returns what it gave."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        stale = (StaleElementReferenceException,)
        return WebDriverWait(self.driver, PATIENCE_S, ignored_exceptions=stale).until(condition)

    def save(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))

    def _open(self, address: str, sign: str) -> None:
        from selenium.common.exceptions import WebDriverException

        def there(driver: Any) -> bool:
            try:
                driver.get(address)
            except WebDriverException:  # the server is not up yet
                return False
            return True

        self.wait(there)
        self.says(sign)

    def _close_assistant(self) -> None:
        """MLflow opens a panel that takes a quarter of the page."""
        from selenium.webdriver.common.by import By

        for button in self.driver.find_elements(By.XPATH, "//button[@aria-label='Close']"):
            if button.is_displayed():
                button.click()


def newest_sweep(store: Path) -> tuple[str, str, list[str]]:
    """The newest run of a store that has children: its experiment, its id, and theirs.

    Raises:
        SystemExit: there is none.
    """
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        found = connection.execute(_SWEEP).fetchone()
        if found is None:
            sys.exit(f"Error: There is no sweep in {store}. Make one with python -m sparse_exp -m ...")
        children = [run_id for (run_id,) in connection.execute(_CHILDREN, (found[1],))]
    return str(found[0]), found[1], children


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
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


if __name__ == "__main__":
    main()
