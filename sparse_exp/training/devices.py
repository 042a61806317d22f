"""Several processes that train one detector together: how they start, and how they end.

The run's own process is the first of them. It starts the others with all that a `Trainer` is made of, and
they train as it does, each on its share of every batch (see `sparse_exp.collectives`). What is decided by
evaluating, and every file and event, is the first one's; it tells the others what came of it.

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
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

from sparse_exp import collectives
from sparse_exp.collectives import Disconnected
from sparse_exp.config.schema import Experiment
from sparse_exp.engines.isolated import exit_with_parent, last_line, start_child
from sparse_exp.errors import ConfigError, SparseExpError, StageFailed, expected, first_line
from sparse_exp.hardware import usable_physical_cores
from sparse_exp.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from sparse_exp.sparsity.recipe import Recipe
    from sparse_exp.training.loop import TrainingResult
    from sparse_exp.training.state import State
    from sparse_exp.yolov5 import YOLOv5

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
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
from sparse_exp.training.devices import serve
serve(int(sys.argv[1]))
"""
_pipes: list[Connection[Any, Any]] = []  # of the first process one to each other; of those one to the first


def training_threads(experiment: Experiment) -> int:
    """Threads of each training process: ``trainer.threads``, or the cores shared out among all that run.

    Like torch's own choice this respects ``OMP_NUM_THREADS``.
    """
    if experiment.trainer.threads is not None:
        return experiment.trainer.threads
    most = os.environ.get("OMP_NUM_THREADS", "")
    share = usable_physical_cores() // (experiment.trainer.devices * _jobs_here(experiment))
    return max(1, min(share, int(most) if most.isdigit() else share))


def _jobs_here(experiment: Experiment) -> int:
    """Jobs of a sweep that share this machine; a cluster gives each its own cores."""
    launcher = experiment.launcher
    here = launcher.name == "joblib" or (launcher.name == "ray" and experiment.ray.address is None)
    return launcher.jobs if here else 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a while.

    Sums are added up in another order with another number: results agree bit for bit only with equal ones.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def make_fabric() -> Fabric:
    """The Fabric of this process: of a CPU or the GPU that is its own."""
    if collectives.size() == 1:
        return Fabric(devices=1)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(
        accelerator=accelerator, devices=collectives.size(), strategy=DDPStrategy(), plugins=[_Place()]
    )
    fabric.launch()
    return fabric


def told_by_first(value: _T) -> _T:
    """What the first process has, in all of them; the others wait for it as long as it takes.

    Raises:
        Disconnected: a process is gone.
    """
    try:
        if collectives.rank():
            told: _T = pickle.loads(_pipes[0].recv_bytes())
            return told
        message = pickle.dumps(value) if _pipes else b""
        for pipe in _pipes:
            pipe.send_bytes(message)
    except (OSError, EOFError) as error:
        raise Disconnected from error
    return value


def require_equal(model: torch.nn.Module, epoch: float) -> None:
    """Hold all processes to the same weights and statistics.

    Raises:
        StageFailed: they have drifted apart.
    """
    names = collectives.differing(model.state_dict())
    if names:
        raise StageFailed(
            f"After epoch {epoch:g} the processes of the training differ in {len(names)} tensors, such as "
            f"{names[0]}. Train with trainer.devices=1."
        )


class _Place(LightningEnvironment):
    """Where a process stands among all, for Fabric: they are there already, and know each other."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return collectives.size()

    def global_rank(self) -> int:
        return collectives.rank()

    def local_rank(self) -> int:
        return collectives.rank()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


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
            _pipes[:] = [other.pipe for other in others]
            with _group(0, devices, meeting):
                yield
        except Disconnected as error:
            raise _reason(others) from error
        finally:
            _pipes.clear()
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
        _pipes[:] = [pipe]
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
