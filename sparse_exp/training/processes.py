"""Several processes that train one detector together: how they start, and how they end.

The run's own process is the first one. It starts the others and sends them all that a `Trainer` is made of.
Each process trains on its share of every batch; `sparse_exp.distributed` makes the result that of one
process. Only the first process evaluates, writes files and reports epochs; it tells the others what it
decided.

The others are fresh interpreters, not children of `multiprocessing`; `sparse_exp.engines.isolated` gives the
reasons. If one dies, the training ends and says why. None outlives the first process.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sparse_exp.children import exit_with_parent, how_it_ended, start_child
from sparse_exp.config.schema import Experiment
from sparse_exp.distributed.collectives import Disconnected
from sparse_exp.distributed.peers import pipes
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, expected, first_line
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training.devices import choose_device
from sparse_exp.training.loop import Trainer, TrainingResult
from sparse_exp.training.memory import is_out_of_memory, no_memory_left
from sparse_exp.training.state import State
from sparse_exp.training.threads import using_threads

_log = logging.getLogger(__name__)
# How long one exchange of numbers may take. A process that dies is noticed at once, and while the first one
# evaluates, the others wait at a pipe without a limit. An hour, because a training pauses for benchmarks.
_TIMEOUT = timedelta(hours=1)
_SECONDS_FOR_A_REASON = 30.0  # that a process which broke a connection has to say why
_INTERFACE = "GLOO_SOCKET_IFNAME"
# The child ignores Ctrl-C: the first process handles it, and ends the others.
_CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[2:]
from sparse_exp.training.processes import join_training
join_training(int(sys.argv[1]))
"""


def check_devices(experiment: Experiment, recipe: Recipe, *, cuda: Any = torch.cuda) -> None:
    """Refuse a training that ``trainer.devices`` processes cannot do together.

    Args:
        experiment: the configuration.
        recipe: its recipe.
        cuda: what is asked for GPUs.

    Raises:
        ConfigError: ``trainer.device`` is a GPU that is not there; this machine has GPUs, but fewer than
            processes; or the recipe takes channels out, which torch's DistributedDataParallel cannot follow.
    """
    devices = experiment.trainer.devices
    gpus = cuda.device_count() if choose_device(experiment.trainer.device, cuda=cuda).type == "cuda" else 0
    if devices > 1 and recipe.slimming:
        do = f"{recipe.name} takes channels out while it trains, which one process does."
        raise ConfigError(expected("trainer.devices", "1", devices, do))
    if gpus and devices > gpus:
        do = "Set trainer.devices to it, or less."
        raise ConfigError(
            expected("trainer.devices", f"at most the {gpus} GPUs of this machine", devices, do)
        )


def fit_together(
    arguments: Mapping[str, Any],
    state: State | None = None,
    *,
    devices: int,
    threads: int,
    on_epoch: Callable[[dict[str, Any]], None],
) -> TrainingResult:
    """Train in one process or more.

    Args:
        arguments: of `Trainer`, all but ``on_epoch``; they are pickled for the other processes.
        state: where to continue, see `Trainer.fit`.
        devices: number of processes; it divides the size of a batch.
        threads: of each process.
        on_epoch: called in this process only, with each record of the history.

    Returns:
        The result of the training.

    Raises:
        SparseExpError: what stopped the training in any of the processes.
    """
    with (
        using_threads(threads),
        _other_processes(devices, threads, arguments, state),
        no_memory_left("Training", "Make trainer.batch_size or dataset.imgsz smaller"),
    ):
        trainer = Trainer(**arguments, on_epoch=on_epoch)
        with arguments["precision"].on(trainer.device):
            return trainer.fit(state)


def join_training(descriptor: int) -> None:
    """The work of another process: train as the first one does, and end with it.

    Args:
        descriptor: file descriptor of its end of the pipe to the first process.
    """
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    rank = 0
    try:
        task: _Task = pickle.loads(pipe.recv_bytes())
        rank = task.rank
        pipe.send_bytes(pickle.dumps(None))
        pipes[:] = [pipe]
        with using_threads(task.threads), _process_group(rank, task.devices, task.meeting, task.arguments):
            trainer = Trainer(**task.arguments)
            with task.arguments["precision"].on(trainer.device):
                trainer.fit(task.state)
    except Exception as error:
        pipe.send_bytes(pickle.dumps(_Failure(_as_ours(error, rank), traceback.format_exc())))


@dataclass(frozen=True)
class _Task:
    """What another process has to do.

    Attributes:
        rank: its number, at least 1.
        devices: number of processes.
        threads: of each process.
        meeting: file by which the processes find each other.
        arguments: of its `Trainer`.
        state: where it continues; None: from the beginning.
    """

    rank: int
    devices: int
    threads: int
    meeting: str
    arguments: dict[str, Any]
    state: State | None


@dataclass(frozen=True)
class _Failure:
    """Why another process failed: the error for the user, and the traceback for the log."""

    error: SparseExpError
    trace: str


@contextmanager
def _other_processes(
    devices: int, threads: int, arguments: Mapping[str, Any], state: State | None
) -> Iterator[None]:
    """Start all other processes of a training; they end with the block."""
    if devices == 1:
        yield
        return
    # The others do not evaluate: with the same loader twice, pickle sends no image of the validation split.
    sent = {**arguments, "data": replace(arguments["data"], val=arguments["data"].train)}
    others: list[_Other] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            others += [_Other(rank) for rank in range(1, devices)]
            meeting = str(Path(folder) / "meeting")
            for other in others:
                other.give(_Task(other.rank, devices, threads, meeting, sent, state))
            for other in others:
                other.wait_until_given()
            pipes[:] = [other.pipe for other in others]
            with _process_group(0, devices, meeting, arguments):
                yield
        except Disconnected as error:
            raise _why_disconnected(others) from error
        finally:
            pipes.clear()
            for other in others:
                other.close()


class _Other:
    """Another process of the training, seen from the first one.

    Args:
        rank: its number, at least 1.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._process, self.pipe, self._output = start_child(_CHILD)

    def give(self, task: _Task) -> None:
        """Send it its task."""
        try:
            self.pipe.send_bytes(pickle.dumps(task))
        except OSError as error:
            raise Disconnected from error

    def wait_until_given(self) -> None:
        """Wait until it has received its task."""
        try:
            answer = pickle.loads(self.pipe.recv_bytes())
        except (OSError, EOFError) as error:
            raise Disconnected from error
        if isinstance(answer, _Failure):
            raise answer.error

    def failure(self, deadline: float) -> SparseExpError | None:
        """Why it ended; None if it says nothing before the deadline, a time of `time.monotonic`."""
        with suppress(OSError, EOFError):  # raised where the process is dead and its end of the pipe closed
            if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                return None
            failure: _Failure = pickle.loads(self.pipe.recv_bytes())
            _log.debug("Process %d of the training failed:\n%s", self.rank, failure.trace)
            return failure.error
        return StageFailed(
            f"Process {self.rank} of the training died ({how_it_ended(self._process.wait(), self._output)}). "
            "Check that memory suffices, or set trainer.devices=1."
        )

    def close(self) -> None:
        """Kill it: it has nothing to save."""
        self.pipe.close()
        self._process.kill()
        self._process.wait()
        self._output.close()


def _why_disconnected(others: Sequence[_Other]) -> SparseExpError:
    """The error that broke a connection; a process that only lost its connection to another comes last."""
    deadline = time.monotonic() + _SECONDS_FOR_A_REASON
    failures = [failure for other in others if (failure := other.failure(deadline))]
    failures.sort(key=lambda failure: isinstance(failure, Disconnected))
    if failures:
        return failures[0]
    return StageFailed(
        f"A process of the training has not answered for {_TIMEOUT.seconds // 60} minutes. "
        "Set trainer.devices=1."
    )


@contextmanager
def _process_group(rank: int, devices: int, meeting: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Set up torch's default process group, of processes of this machine, for the block."""
    given = os.environ.get(_INTERFACE)
    addresses = psutil.net_if_addrs().items()
    loopback = (name for name, own in addresses if any(a.address == "127.0.0.1" for a in own))
    os.environ[_INTERFACE] = given or next(loopback, "lo")
    try:
        device = choose_device(arguments["config"].device, rank=rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(meeting, devices)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=devices, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise Disconnected from error
    finally:
        if given is None:
            del os.environ[_INTERFACE]
    try:
        yield
    finally:
        dist.destroy_process_group()


def _as_ours(error: Exception, rank: int) -> SparseExpError:
    """An error of another process as one for the user, of one line."""
    if isinstance(error, SparseExpError):
        return error
    who = f"Process {rank} of the training"
    if is_out_of_memory(error):
        return StageFailed(f"{who} ran out of memory. Make trainer.batch_size smaller.")
    return StageFailed(f"{who} failed: {type(error).__name__}: {first_line(error)} Set trainer.devices=1.")
