"""Several processes that train one detector together: how they start, and how they end.

The run's own process is the first of them. It starts the others with all that a `Trainer` is made of, and
they train as it does, each on its share of every batch (see `sparse_exp.distributed.collectives`). What is
decided by evaluating, and every file and event, is the first one's; it tells the others what came of it.

They start as fresh interpreters and not by `multiprocessing`, for the reasons in
`sparse_exp.engines.isolated`. One that dies ends the training with its reason, and none outlives the first.
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
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from sparse_exp.children import exit_with_parent, last_line, start_child
from sparse_exp.config.schema import Experiment
from sparse_exp.distributed import collectives
from sparse_exp.distributed.collectives import Disconnected
from sparse_exp.distributed.peers import pipes
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, expected, first_line
from sparse_exp.training.memory import is_out_of_memory
from sparse_exp.training.threads import using_threads

if TYPE_CHECKING:
    from sparse_exp.sparsity.recipe import Recipe
    from sparse_exp.training.loop import TrainingResult
    from sparse_exp.training.state import State
    from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)
# Of one exchange. A process that dies is noticed at once, and what the others wait for while the first
# evaluates comes through a pipe, however long that takes. An hour: a training gives way to benchmarks.
_TIMEOUT = timedelta(hours=1)
_PATIENCE_S = 30.0  # for the reason of a process that broke a connection
_INTERFACE = "GLOO_SOCKET_IFNAME"
# The interrupt belongs to the first process, which then ends the others.
_CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = sys.argv[2:]
from sparse_exp.training.processes import serve
serve(int(sys.argv[1]))
"""


def check_devices(experiment: Experiment, recipe: Recipe, model: YOLOv5) -> None:
    """Refuse what several processes cannot train.

    Args:
        experiment: the configuration.
        recipe: its recipe.
        model: before quantization; left as it is.

    Raises:
        ConfigError: there are fewer GPUs than processes.
        RecipeError: it quantizes with observers that cannot be shared.
    """
    devices = experiment.trainer.devices
    if devices == 1:
        return
    gpus = torch.cuda.device_count()
    if gpus and devices > gpus:
        do = "Set trainer.devices to it, or less."
        raise ConfigError(
            expected("trainer.devices", f"at most the {gpus} GPUs of this machine", devices, do)
        )
    if recipe.quantization_start is not None:
        collectives.check_observers(recipe.apply_structure(deepcopy(model)))


def fit_together(
    arguments: Mapping[str, Any],
    state: State | None = None,
    *,
    devices: int,
    threads: int,
    on_epoch: Callable[[dict[str, Any]], None],
) -> TrainingResult:
    """Train with one process or more.

    Args:
        arguments: of `Trainer`, all but ``on_epoch``; they go to the other processes by pickle.
        state: where to go on, see `Trainer.fit`.
        devices: processes; they divide the size of a batch.
        threads: of each.
        on_epoch: called in this process only, with each record of the history.

    Raises:
        SparseExpError: what stopped the training in any of the processes.
    """
    from sparse_exp.training.loop import Trainer  # which imports this module

    with using_threads(threads), _others(devices, threads, arguments, state):
        return Trainer(**arguments, on_epoch=on_epoch).fit(state)


@dataclass(frozen=True)
class _Order:
    """What another process is to do.

    Attributes:
        rank: which one it is.
        devices: how many there are.
        threads: of each.
        meeting: file by which they find each other.
        arguments: of its `Trainer`.
        state: where it goes on, if not at the beginning.
    """

    rank: int
    devices: int
    threads: int
    meeting: str
    arguments: dict[str, Any]
    state: State | None


@dataclass(frozen=True)
class _Failure:
    """Why another process ended: in one line, and for the log."""

    error: SparseExpError
    trace: str


@contextmanager
def _others(devices: int, threads: int, arguments: Mapping[str, Any], state: State | None) -> Iterator[None]:
    """All other processes of a training, at work until the block ends."""
    if devices == 1:
        yield
        return
    # Only the first evaluates; and no image is sent twice.
    sent = {**arguments, "data": replace(arguments["data"], val=arguments["data"].train)}
    others: list[_Other] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            others += [_Other(rank) for rank in range(1, devices)]
            meeting = str(Path(folder) / "meeting")
            for other in others:
                other.order(_Order(other.rank, devices, threads, meeting, sent, state))
            for other in others:
                other.wait()
            pipes[:] = [other.pipe for other in others]
            with _group(0, devices, meeting):
                yield
        except Disconnected as error:
            raise _reason(others) from error
        finally:
            pipes.clear()
            for other in others:
                other.close()


class _Other:
    """Another process of the training, as the first one sees it.

    Args:
        rank: which one.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._process, self.pipe, self._output = start_child(_CHILD)

    def order(self, order: _Order) -> None:
        """Tell it what to do."""
        try:
            self.pipe.send_bytes(pickle.dumps(order))
        except OSError as error:
            raise Disconnected from error

    def wait(self) -> None:
        """Wait until it has understood."""
        try:
            answer = pickle.loads(self.pipe.recv_bytes())
        except (OSError, EOFError) as error:
            raise Disconnected from error
        if isinstance(answer, _Failure):
            raise answer.error

    def failure(self, deadline: float) -> SparseExpError | None:
        """Why it ended; None if it has not until then (`time.monotonic`)."""
        with suppress(OSError, EOFError):  # then it is dead, and its end of the pipe closed
            if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                return None
            failure: _Failure = pickle.loads(self.pipe.recv_bytes())
            _log.debug("Process %d of the training failed:\n%s", self.rank, failure.trace)
            return failure.error
        code = self._process.wait()
        how, said = f"signal {-code}" if code < 0 else f"exit code {code}", last_line(self._output)
        return StageFailed(
            f"Process {self.rank} of the training died ({how}{', ' if said else ''}{said}). "
            "Check that memory suffices, or set trainer.devices=1."
        )

    def close(self) -> None:
        """End it; it has nothing to save."""
        self.pipe.close()
        self._process.kill()
        self._process.wait()
        self._output.close()


def _reason(others: Sequence[_Other]) -> SparseExpError:
    """Why a connection broke: what happened to one of the others, not what it did to the rest."""
    deadline = time.monotonic() + _PATIENCE_S
    failures = [failure for other in others if (failure := other.failure(deadline))]
    failures.sort(key=lambda failure: isinstance(failure, Disconnected))
    late = StageFailed(
        f"A process of the training has not answered for {_TIMEOUT.seconds // 60} minutes. "
        "Set trainer.devices=1."
    )
    return failures[0] if failures else late


@contextmanager
def _group(rank: int, devices: int, meeting: str) -> Iterator[None]:
    """Torch's default process group, of processes of this machine."""
    given = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = given or _loopback()
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
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


def _loopback() -> str:
    """The network interface that leads to this machine only."""
    addresses = psutil.net_if_addrs().items()
    return next((name for name, own in addresses if any(a.address == "127.0.0.1" for a in own)), "lo")


def serve(descriptor: int) -> None:
    """The work of another process: train as the first one does, and end with it.

    Args:
        descriptor: file descriptor of its end of the pipe to the first one.
    """
    threading.Thread(target=exit_with_parent, args=(descriptor,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(descriptor)
    rank = 0
    try:
        order: _Order = pickle.loads(pipe.recv_bytes())
        rank = order.rank
        pipe.send_bytes(pickle.dumps(None))
        pipes[:] = [pipe]
        _train(order)
    except Exception as error:
        pipe.send_bytes(pickle.dumps(_Failure(_in_one_line(error, rank), traceback.format_exc())))


def _train(order: _Order) -> None:
    from sparse_exp.training.loop import Trainer

    with using_threads(order.threads), _group(order.rank, order.devices, order.meeting):
        Trainer(**order.arguments).fit(order.state)


def _in_one_line(error: Exception, rank: int) -> SparseExpError:
    if isinstance(error, SparseExpError):
        return error
    who = f"Process {rank} of the training"
    if is_out_of_memory(error):
        return StageFailed(f"{who} ran out of memory. Make trainer.batch_size smaller.")
    return StageFailed(f"{who} failed: {type(error).__name__}: {first_line(error)} Set trainer.devices=1.")
