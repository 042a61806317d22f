"""Past runs as MLflow knows them, and the files that it keeps with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_exp.config.places import SQLITE
from sparse_exp.config.schema import TrackerConfig
from sparse_exp.errors import SparseExpError, expected
from sparse_exp.redaction import without_secrets
from sparse_exp.tracking import PARENT_TAG, FoundRun, database
from sparse_exp.tracking.messages import one_line
from sparse_exp.tracking.mlflow import import_client, pages
from sparse_exp.tracking.store import tracking_uri


def read_runs(
    config: TrackerConfig,
    store: Path,
    *,
    experiment: str | None = None,
    run_ids: Sequence[str] = (),
    only: str = "",
    newest: int | None = None,
) -> list[FoundRun]:
    """Runs of MLflow, whatever their status, newest first.

    A SQLite database is read as it is, without importing MLflow, unless it is to be filtered; a server is
    asked through MLflow's client, page by page.

    Args:
        config: names the server; see `sparse_exp.tracking.store.tracking_uri`.
        store: directory of the local database, where no server is named.
        experiment: name of the experiment to read, None: all.
        run_ids: read these runs and their children (a sweep's runs) only.
        only: of these, those that fit, in MLflow's language of filters; "": all.
        newest: of these, so many that started last; None: all.

    Raises:
        SparseExpError: there is no such store or experiment, or it does not answer.
    """
    with _answering(config, store) as uri:
        if uri.startswith(SQLITE) and not only:
            found = database.read(_file_of(uri), experiment=experiment, run_ids=run_ids, newest=newest)
        else:
            found = _ask(import_client()(uri), experiment, run_ids, only, newest)
        if experiment is not None and not found:
            do = "The experiments are in MLflow's UI (make dashboard); runs go to sparse_exp by default."
            fitting = f" that fit {only}" if only else ""
            raise SparseExpError(
                expected("--experiment", f"an MLflow experiment with runs{fitting}", experiment, do)
            )
        return found


def fetch_files(config: TrackerConfig, store: Path, run_id: str, names: Sequence[str], place: Path) -> None:
    """Bring files that MLflow keeps with a run into a directory; those that it does not have are left out.

    Args:
        config: see `read_runs`.
        store: see `read_runs`.
        run_id: MLflow's name of the run.
        names: of the files.
        place: an existing directory.

    Raises:
        SparseExpError: there is no such store or run, or it does not answer.
    """
    with _answering(config, store) as uri:
        client = import_client()(uri)
        kept = {file.path for file in client.list_artifacts(run_id)}
        for name in (name for name in names if name in kept):
            client.download_artifacts(run_id, name, str(place))


def _ask(
    client: Any, experiment: str | None, run_ids: Sequence[str], only: str = "", newest: int | None = None
) -> list[FoundRun]:
    if experiment is None:
        experiments = [found.experiment_id for found in client.search_experiments()]
    else:
        found = client.get_experiment_by_name(experiment)
        experiments = [found.experiment_id] if found is not None else []
    if not experiments:
        return []
    questions = [f"attributes.run_id = '{run_id}'" for run_id in run_ids]
    questions += [f"tags.`{PARENT_TAG}` = '{run_id}'" for run_id in run_ids]
    filters = [" and ".join(filter(None, (text, only))) for text in questions or [""]]
    runs = {run.info.run_id: run for text in filters for run in pages(client, experiments, text, newest)}
    found = [
        FoundRun(
            run.info.run_id,
            run.data.tags,
            run.data.metrics,
            run.info.run_name,
            run.info.status,
            run.info.start_time,
        )
        for run in sorted(runs.values(), key=lambda run: (-run.info.start_time, run.info.run_id))
    ]
    return found[:newest]


@contextmanager
def _answering(config: TrackerConfig, store: Path) -> Iterator[str]:
    """The address of a store; what goes wrong with it becomes one line.

    Raises:
        SparseExpError: a database that is not there, or an error of MLflow's or SQLite's own.
    """
    uri, named_by = tracking_uri(config, store)
    what = f"the MLflow tracking store ({named_by})"
    if uri.startswith(SQLITE) and not _file_of(uri).is_file():
        do = "Name it with --store or MLFLOW_TRACKING_URI, or give run directories."
        raise SparseExpError(expected(what, "a database with runs", uri, do))
    try:
        yield uri
    except SparseExpError:
        raise
    except Exception as error:
        do = f"({one_line(error)}) Start or repair it, or give run directories."
        raise SparseExpError(expected(what, "usable", without_secrets(uri), do)) from error


def _file_of(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE))
