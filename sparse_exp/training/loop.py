"""The training loop: the phases of a recipe, step by step, on Lightning Fabric."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import seed_everything
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sparse_exp.config.imgsz import Imgsz
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import Batch, DetectionLoader
from sparse_exp.distributed import collectives
from sparse_exp.distributed.peers import broadcast_from_first, make_fabric, require_equal
from sparse_exp.errors import StageFailed
from sparse_exp.locks import give_way, waited_seconds
from sparse_exp.progress import Bar, progress
from sparse_exp.quantization.quantizers import calibrate, release
from sparse_exp.recipes.checkpoints import CheckpointWriter
from sparse_exp.recipes.modifiers import SlimmingModifier
from sparse_exp.recipes.recipe import Phase, Recipe
from sparse_exp.recipes.sparsifier import Sparsifier
from sparse_exp.sparsity.measure import SparsityContract, layer_sparsity, overall, total_macs
from sparse_exp.sparsity.slimming import choose_channels, fit_norms, gradient_scores, weight_scores
from sparse_exp.training.averaging import exponential, zero_where_zero
from sparse_exp.training.batches import Buffers, no_images, weighted_parts
from sparse_exp.training.devices import choose_device
from sparse_exp.training.evaluation import Validation, as_input
from sparse_exp.training.freezing import freeze
from sparse_exp.training.memory import is_out_of_memory
from sparse_exp.training.optimizer import BIASES, WEIGHTS, make_optimizer
from sparse_exp.training.parallel import ParallelForward
from sparse_exp.training.phases import (
    Best,
    check_phases,
    evaluated_spans,
    first_step,
    is_pruning,
    last_mosaic,
    score_of,
)
from sparse_exp.training.precision import Precision
from sparse_exp.training.state import (
    Position,
    State,
    StateError,
    StateFile,
    random_state,
    require_whole,
    set_random_state,
    short_reason,
)
from sparse_exp.yolov5 import DetectionLoss, YOLOv5, read_checkpoint
from sparse_exp.yolov5.channels import channels_of, keep_channels
from sparse_exp.yolov5.model import STRIDES

_log = logging.getLogger(__name__)

Record = dict[str, Any]
_NAMES = {"map50": "mAP50", "map50_95": "mAP50-95", "fitness": "fitness"}
_LEFT_OUT = 5  # steps in a row whose gradients are not finite, after which a training ends
_MANY_LEFT_OUT, _RECENT = 10, 50  # or so many of the last steps


@dataclass(frozen=True)
class TrainingData:
    """The data that a training reads.

    Attributes:
        train: augmented batches of the training split.
        val: how accuracies on the validation split are measured.
        names: class names.
        imgsz: size of the images.
        calibration: images on which the first ranges of quantization are found (None: in the first batches of
            the quantized phase), and on which channels are judged.
    """

    train: DetectionLoader
    val: Validation
    names: tuple[str, ...]
    imgsz: Imgsz
    calibration: DetectionLoader | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        history: one record per epoch, and one per phase that ends within an epoch.
        phases: the best checkpoint of each phase, in order; that of the last phase is the training's result.
    """

    history: list[Record]
    phases: dict[str, Best]

    @property
    def best(self) -> dict[str, Path]:
        """The file of the best checkpoint of each phase."""
        return {name: best.path for name, best in self.phases.items()}


class Trainer:
    """Trains one detector under one recipe.

    Args:
        model: with the start weights, already pruned if the recipe only holds zeros; trained in place.
        recipe: the recipe.
        data: loaders.
        config: hyper-parameters.
        precision: see `choose_precision`.
        weights: directory for checkpoints.
        seed: of all randomness.
        on_epoch: called with each record of the history.
        optimizer: see `make_optimizer`.
        teacher: for a recipe that distills: a detector for as many classes as the model.
        parent_teaches: the teacher gets the best weights of the phase before the first channels go.
        qat_split: number of parts into which a batch is cut in quantized phases. Their gradients add up to
            one step, as of the whole batch, but batch norms see only one part at a time. The number doubles
            when memory runs out.
        composed: the recipe that checkpoints store, that of the start checkpoint included; "": ``recipe``
            alone.
        state: file that keeps the state of the training after every record of the history; None: the state is
            not kept.

    Attributes:
        model: as given.
    """

    def __init__(
        self,
        model: YOLOv5,
        recipe: Recipe,
        data: TrainingData,
        config: TrainerConfig,
        precision: Precision,
        *,
        weights: Path,
        seed: int,
        on_epoch: Callable[[Record], None] = lambda _: None,
        optimizer: str = "adamw",
        teacher: YOLOv5 | None = None,
        parent_teaches: bool = False,
        qat_split: int = 1,
        composed: str = "",
        state: StateFile | None = None,
    ) -> None:
        seed_everything(seed, verbose=False)
        self._fabric = make_fabric(choose_device(config.device, rank=collectives.rank()))
        self.model, self._recipe, self._data = model, recipe, data
        self._config, self._precision, self._on_epoch = config, precision, on_epoch
        self._share = data.train.share(collectives.rank(), collectives.size())
        self._writer = CheckpointWriter(weights, data.names, data.imgsz, composed or recipe.text)
        self._model, self._teacher = self._on_device(model), teacher and self._on_device(teacher).eval()
        self._parent_teaches = parent_teaches
        self._whole = total_macs(model.quantizable_convolutions(), STRIDES[-1])
        recipe.prepare(self._model)
        self._frozen = freeze(self._model, config.freeze)
        self._forward = ParallelForward(self._fabric, self._model)
        self._ema = AveragedModel(
            model, multi_avg_fn=exponential(config.ema_decay, config.ema_tau), use_buffers=True
        )
        self._optimizer = make_optimizer(model, config, optimizer)
        self._loss = DetectionLoss(model.anchors, model.num_classes, config.loss, data.imgsz)
        self._start = {layer.name: layer.sparsity for layer in layer_sparsity(model.prunable_convolutions())}
        self._contract = SparsityContract()
        self._best: dict[str, Best] = {}
        self._split = qat_split
        self._quantizing = False
        self._left_out = deque[int](maxlen=_MANY_LEFT_OUT)  # the last steps, counted from 1
        self._now = 0  # the step that is being taken
        self._state_file, self._position, self._history = state, Position(), list[Record]()

    @property
    def device(self) -> torch.device:
        """That of this process."""
        return self._fabric.device

    def fit(self, state: State | None = None) -> TrainingResult:
        """Train to the end of the recipe.

        Args:
            state: of an unfinished training with the same arguments. This training continues there, and its
                result is the one that the other would have had. The dict is emptied. None: start at the
                beginning.

        Raises:
            RecipeError: a phase is shorter than one step, or a distilling recipe has no teacher.
            SparsityError: a promised zero did not stay zero, or a layer has fewer zeros than expected.
            StageFailed: the gradients of several steps in a row, or of many of the last, are not finite.
            StateError: the state is of another training. It may have changed this trainer: make a new one.
        """
        steps, phases = len(self._data.train), self._recipe.phases()
        check_phases(phases, steps)
        if state:
            self._slim_as(state)
        sparsifier = self._recipe.attach(self._model, self._optimizer, steps, teacher=self._teacher)
        self._contract.extend(self._model.prunable_convolutions(), self._expected_sparsity(0.0))
        if state:
            self._continue_from(state, phases, steps, sparsifier)
        with progress("Training", first_step(phases[-1].end, steps), "steps") as bar:
            bar.goto(self._position.step)
            train = partial(
                self._train, steps_per_epoch=steps, batches=self._batches(), sparsifier=sparsifier, bar=bar
            )
            for index, phase in enumerate(phases[self._position.phase :], self._position.phase):
                first = first_step(phase.start, steps)
                if self._position.step <= first:
                    self._begin_phase(phase, phases[:index], sparsifier, first / steps)
                for record in self._train_phase(phase, steps, train):
                    self._history.append(record)
                    self._on_epoch(record)
                    self._save_state(sparsifier)
                    bar.advance(0, note=f"{record['phase']}, mAP50 {record['val/map50']:.3f}")
                bar.goto(first_step(phase.end, steps))  # also where the phase ended early
        sparsifier.finish()
        return TrainingResult(self._history, dict(self._best))

    def _save_state(self, sparsifier: Sparsifier) -> None:
        if self._state_file is None or collectives.rank():
            return
        best = {name: {**asdict(best), "path": best.path.name} for name, best in self._best.items()}
        fixed = [name for name, weight in self._model.named_parameters() if not weight.requires_grad]
        state: State = {
            "at": asdict(self._position),
            "history": self._history,
            "best": best,
            "model": self._model.state_dict(),
            "fixed": fixed,
            "averaged": None if self._quantizing else self._ema.state_dict(),  # QAT does not use the average
            "optimizer": self._optimizer.state_dict(),
            "sparsifier": sparsifier.state(),
            "zeros": self._contract.masks,
            "widths": self._model.widths,
            "start": self._start,
            "quantizing": self._quantizing,
            "split": self._split,
            "random": random_state(),
        }
        self._state_file.write(state)

    def _continue_from(self, state: State, phases: list[Phase], steps: int, sparsifier: Sparsifier) -> None:
        """Bring the training to where it was when the state was saved, and empty the state."""
        try:
            self._position = Position.of(state["at"], len(phases), first_step(phases[-1].end, steps))
            begun = [first_step(phase.start, steps) for phase in phases[: self._position.phase + 1]]
            last = self._position.step - 1
            for step in [*(first for first in begun if first <= last), last]:
                sparsifier.before_step(step / steps)  # builds QAT modules, freezes batch norms, sets hooks
            sparsifier.restore(state["sparsifier"])
            self._restore(state)
            if self._position.step > self._first_cut(steps):
                self._let_parent_teach()
            state.clear()  # it is as large as the training itself, and no longer needed
        except Exception as error:  # SparseML and torch may raise anything for the state of another training
            raise StateError(f"it does not fit this training ({short_reason(error)})") from error
        done = self._position.step / steps
        _log.info("Going on with the training after epoch %g of %g.", done, phases[-1].end)

    def _restore(self, state: State) -> None:
        """Set all but the position and the sparsifier to what they were when the state was saved."""
        self._model.load_state_dict(state["model"])
        for name, weight in self._model.named_parameters():
            weight.requires_grad_(name not in state["fixed"])
        self._start = state.get("start", self._start)
        self._quantizing, self._split = bool(state["quantizing"]), int(state["split"])
        if not self._quantizing:
            self._ema.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._contract.masks = {n: m.to(self._fabric.device) for n, m in state["zeros"].items()}
        self._history = list(state["history"])
        for name, kept in state["best"].items():
            best = Best(**{**kept, "path": self._writer.folder / Path(kept["path"]).name})
            require_whole(best.path)
            self._best[name] = best
        set_random_state(state["random"])  # last, because the lines above may draw random numbers

    def _begin_phase(
        self, phase: Phase, before: Sequence[Phase], sparsifier: Sparsifier, epoch: float
    ) -> None:
        """Begin a phase. QAT begins with averaged weights, and with ranges of images as they are."""
        self._best.pop(phase.name, None)
        if not phase.quantized or self._quantizing:
            return
        self._quantizing = True
        if before:
            self._model.load_state_dict(self._weights_to_quantize(before[-1]))
        sparsifier.before_step(epoch)
        if self._data.calibration:
            calibrate(self._model, (self._as_input(batch) for batch in self._data.calibration))

    def _weights_to_quantize(self, before: Phase) -> dict[str, Any]:
        """The best weights of the phase before, or the last; of a phase that makes zeros always the last."""
        if self._config.quantize_from == "last" or is_pruning(before):
            return self._ema.module.state_dict()
        best = self._best[before.name]
        _log.info("Quantization starts from the best weights so far, those after epoch %g.", best.epoch)
        return read_checkpoint(best.path).state_dict

    def _slim_as(self, state: State) -> None:
        """Give the network as many channels as it had when a state was saved."""
        widths = state.get("widths")
        if not widths:
            return
        try:
            kept = {name: torch.arange(widths[name]) for name in channels_of(self._model)}
            for model in (self._model, self._averaged):
                keep_channels(model, kept)
        except Exception as error:
            raise StateError(f"it does not fit this training ({short_reason(error)})") from error

    @property
    def _averaged(self) -> YOLOv5:
        return cast(YOLOv5, self._ema.module)

    def _first_cut(self, steps_per_epoch: int) -> float:
        """The step before which the first channels go; infinite where none do."""
        slimming = self._recipe.slimming
        return first_step(slimming.start, steps_per_epoch) if slimming else math.inf

    def _slim_if_due(self, step: int, steps_per_epoch: int, sparsifier: Sparsifier) -> None:
        """Take channels out before a step where the recipe says so, the first out of the best weights."""
        slimming = self._recipe.slimming
        moments = slimming.moments if slimming else []
        shares = [share for epoch, share in moments if first_step(epoch, steps_per_epoch) == step]
        if slimming is None or not shares:
            return
        if step == self._first_cut(steps_per_epoch) and (best := self._before_slimming()):
            _log.info("Channels are taken out of the best weights so far, those after epoch %g.", best.epoch)
            state = read_checkpoint(best.path).state_dict
            self._model.load_state_dict(state)
            self._averaged.load_state_dict(state)
            self._let_parent_teach()
        self._slim(slimming, min(shares), sparsifier)

    def _slim(self, slimming: SlimmingModifier, share: float, sparsifier: Sparsifier) -> None:
        """Take channels out of the trained and of the averaged network, and of all that goes with them."""
        if slimming.importance == "gradients":
            scores = gradient_scores(self._averaged, self._samples(), self._loss)
        else:
            scores = weight_scores(self._averaged)
        multiple = round(slimming.multiple)
        kept = choose_channels(self._averaged, scores, share, whole=self._whole, multiple=multiple)
        cuts = keep_channels(self._model, kept)
        keep_channels(self._averaged, kept)
        for name, parameter in self._model.named_parameters():
            moments = self._optimizer.state.get(parameter, {})
            for key, value in moments.items():
                if name in cuts and isinstance(value, Tensor) and value.ndim:
                    moments[key] = cuts[name].of(value)
        sparsifier.cut(cuts)
        masks = self._contract.masks
        self._contract.masks = {name: cuts[f"{name}.weight"].of(mask) for name, mask in masks.items()}
        convolutions = self._model.prunable_convolutions()
        self._start = {layer.name: layer.sparsity for layer in layer_sparsity(convolutions)}
        for model in (self._model, self._averaged):
            fit_norms(model, (images for images, _ in self._samples()))
        left = total_macs(self._model.quantizable_convolutions(), STRIDES[-1]) / self._whole
        _log.info("Channels were taken out: %.1f %% of the multiplications are left.", 100 * left)

    def _samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images that channels are judged on, and their targets."""
        for batch in self._data.calibration or ():
            yield self._as_input(batch), batch.targets.to(self._fabric.device)

    def _before_slimming(self) -> Best | None:
        """The best weights of the phase before the first channels go; None where they go at once."""
        phases, slimming = self._recipe.phases(), self._recipe.slimming
        before = [phase for phase in phases if slimming and phase.end <= slimming.start]
        return self._best.get(before[-1].name) if before else None

    def _let_parent_teach(self) -> None:
        best = self._before_slimming()
        if self._parent_teaches and self._teacher is not None and best is not None:
            self._teacher.load_state_dict(read_checkpoint(best.path).state_dict)

    def _train_phase(
        self, phase: Phase, steps: int, train: Callable[[Phase, range], Record]
    ) -> Iterator[Record]:
        """Train a phase to its end, or until it stops getting better; yields a record for each evaluation."""
        spans = evaluated_spans(phase, steps, self._config.val_every)
        for span in spans:
            if span.start < self._position.step:
                continue
            record, ends = train(phase, span), span is spans[-1]
            record.update(self._validate(phase, span.stop / steps, ends=ends))
            if not ends and self._stagnates(phase, record["epoch"]):
                self._end_early(phase, record)
                ends = True
            self._position.step, self._position.phase = span.stop, self._position.phase + ends
            yield record
            if ends:
                return

    def _stagnates(self, phase: Phase, epoch: float) -> bool:
        patience = self._config.patience
        if patience is None or is_pruning(phase):
            return False
        return epoch - self._best[phase.name].epoch >= patience

    def _end_early(self, phase: Phase, record: Record) -> None:
        """End a phase before its time; the training goes on from the phase's best weights."""
        best = self._best[phase.name]
        record["stopped early"] = True
        _log.info(
            "The phase %s ends early, after epoch %g of %g: no better %s than %.3f since epoch %g.",
            *(phase.name, record["epoch"], phase.end, _NAMES[self._config.monitor], best.score, best.epoch),
        )
        state = read_checkpoint(best.path).state_dict
        self._model.load_state_dict(state)
        if not phase.quantized:
            self._ema.module.load_state_dict(state)

    def _train(
        self,
        phase: Phase,
        steps: range,
        steps_per_epoch: int,
        batches: Iterator[Batch],
        sparsifier: Sparsifier,
        bar: Bar,
    ) -> Record:
        """Take steps of a phase, without evaluating; returns their mean losses, learning rates and speed."""
        self._model.train()
        for norm in self._frozen:
            norm.eval()
        collectives.synchronize_statistics(self._model)
        started, sums = time.perf_counter() - waited_seconds(), defaultdict[str, float](float)
        for step in steps:
            if collectives.rank() == 0:  # the others wait for the first process
                give_way()
            self._now = step
            batch, epoch = next(batches), step / steps_per_epoch
            if not self._recipe.sets_learning_rate:
                self._set_learning_rate(epoch)
            self._set_momentum(epoch)
            self._slim_if_due(step, steps_per_epoch, sparsifier)
            sparsifier.before_step(epoch)
            for name, value in self._step(batch, sparsifier, epoch, quantized=phase.quantized).items():
                sums[name] += value
            bar.advance()
        seconds, images = time.perf_counter() - waited_seconds() - started, sums.pop("images")
        left_out = int(sums.pop("left out", 0))
        if left_out:
            _log.warning(
                "Left out %d of %d steps up to epoch %g: their gradients are not finite.",
                *(left_out, len(steps), steps.stop / steps_per_epoch),
            )
        return {
            "phase": phase.name,
            **{f"loss/{name}": total / (len(steps) - left_out) for name, total in sums.items()},
            **({"left out": left_out} if left_out else {}),
            **self._learning_rates(),
            "images_per_s": images / seconds,
            "seconds": seconds,
        }

    def _step(
        self, batch: Batch, sparsifier: Sparsifier, epoch: float, *, quantized: bool
    ) -> dict[str, float]:
        """Take one step; returns the number of images and the mean losses of all processes.

        A step whose losses or gradients are not finite changes no weight, statistic or average. Only the
        recipe goes on, and the step counts as "left out".
        """
        accumulate = self._accumulate_in_parts if quantized else self._accumulate
        buffers = Buffers(self._model)
        losses = accumulate(batch, sparsifier, epoch)
        self._forward.sum_others(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_grad_norm)
        finite = all(map(math.isfinite, (float(norm), *losses.values())))  # in all processes or in none
        if not finite:
            buffers.restore()
            self._leave_out(epoch, losses)
            self._optimizer.zero_grad()  # of parameters without a gradient an optimizer changes nothing
        sparsifier.step(epoch)
        if not finite:
            return {"images": losses["images"], "left out": 1.0}
        if not quantized:
            self._ema.update_parameters(self._model)
        return losses

    def _leave_out(self, epoch: float, losses: dict[str, float]) -> None:
        """Count a step whose gradients are not finite; a few in a row, or many of late, end the training."""
        step, config, left_out = self._now + 1, self._config, self._left_out
        left_out.append(step)
        if len(left_out) >= _LEFT_OUT and left_out[-_LEFT_OUT] == step - _LEFT_OUT + 1:
            where = f"the steps {step - _LEFT_OUT + 1} to {step}"
        elif len(left_out) == _MANY_LEFT_OUT and left_out[0] > step - _RECENT:
            where = f"{_MANY_LEFT_OUT} of the steps {left_out[0]} to {step}"
        else:
            return
        rates = ", ".join(f"{name} {rate:g}" for name, rate in self._learning_rates().items())
        do = "Make the learning rate smaller (trainer.lr, or that of the recipe)"
        precise = ", or set trainer.precision=fp32" if self._precision.autocast else ""
        raise StageFailed(
            f"The loss or its gradients are not finite in {where} (epoch "
            f"{epoch:.3g}, {rates}, batches of {config.batch_size} images; the last losses: "
            f"{', '.join(f'{n} {v:.3g}' for n, v in losses.items() if n != 'images')}). {do}{precise}."
        )

    def _accumulate_in_parts(self, batch: Batch, sparsifier: Sparsifier, epoch: float) -> dict[str, float]:
        """Compute the gradients of a batch under QAT; where memory runs out, again in more parts."""
        buffers, random = Buffers(self._model), torch.get_rng_state()
        while True:
            try:
                return self._accumulate(batch, sparsifier, epoch, parts=self._split, autocast=False)
            except (RuntimeError, MemoryError) as error:
                # One of several processes cannot repeat a step: the others are in the middle of it.
                if self._split >= len(batch.images) or collectives.size() > 1 or not is_out_of_memory(error):
                    raise
            # Not within the except block, where the traceback keeps the activations alive.
            self._split *= 2
            buffers.restore()
            release(self._model)
            torch.set_rng_state(random)
            _log.warning(
                "A quantized step ran out of memory; from here on each batch is computed in %d parts, which "
                "add up to the same step.",
                self._split,
            )

    def _accumulate(
        self, batch: Batch, sparsifier: Sparsifier, epoch: float, *, parts: int = 1, autocast: bool = True
    ) -> dict[str, float]:
        """Compute the gradients of a batch part by part; returns what `_step` does."""
        autocast = self._precision.autocast and autocast
        device, sums = self._fabric.device.type, defaultdict[str, float](float)
        self._optimizer.zero_grad()
        pieces = weighted_parts(batch, parts)
        whole = sum(count for _, count in pieces)
        for index, (part, count) in enumerate(pieces, 1):
            images = self._as_input(part)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                raw = self._forward(images, exchange=index == len(pieces))
            task, losses = self._loss(raw, part.targets.to(self._fabric.device, non_blocking=True))
            loss = sparsifier.loss(task, images, raw, epoch)
            self._forward.backward(loss)
            if self._recipe.distills:  # may be less than 0, because hardness makes the task's share smaller
                losses["distill"] = (loss - task).detach() / count
            for name, value in losses.items():
                sums[name] += float(value) * count / whole
        means = collectives.total_of(list(sums.values()))
        return {"images": whole, **dict(zip(sums, means, strict=True))}

    def _validate(self, phase: Phase, epoch: float, *, ends: bool) -> Record:
        """Check the sparsity contract, evaluate, and save; the first process tells the others the results."""
        model: YOLOv5 = self._model if phase.quantized else self._ema.module  # type: ignore[assignment]
        promised = self._check_zeros(phase, model, epoch)
        require_equal(self._model, epoch)
        is_first = collectives.rank() == 0
        record = self._evaluate(phase, model, epoch, promised, ends=ends) if is_first else {}
        record, self._best, random = broadcast_from_first((record, self._best, random_state()))
        set_random_state(random)  # evaluating may have drawn random numbers in the first process
        return record

    def _evaluate(
        self, phase: Phase, model: YOLOv5, epoch: float, promised: dict[str, float], *, ends: bool
    ) -> Record:
        """Measure mAP, and save the model as the last checkpoint, and as the phase's best if it is."""
        result = self._data.val.evaluate_model(model, self._precision.memory_format)
        record = {
            "epoch": epoch,
            "val/map50": result.map50,
            "val/map50_95": result.map50_95,
            "sparsity/prunable": overall(layer_sparsity(model.prunable_convolutions())),
        }
        self._writer.save("last.pt", model, phase.name, record, promised)
        best, score = self._best.get(phase.name), score_of(record, self._config.monitor)
        if ends if is_pruning(phase) else best is None or score > best.score:
            path = self._writer.save(f"best_{phase.name}.pt", model, phase.name, record, promised)
            self._best[phase.name] = Best(path, epoch, result.map50, score, promised)
        return record

    def _check_zeros(self, phase: Phase, evaluated: YOLOv5, epoch: float) -> dict[str, float]:
        """Compare trained and evaluated weights with the contract; returns the promised shares of zeros."""
        expected = self._expected_sparsity(epoch)
        if "prun" in phase.name:
            zero_where_zero(evaluated, self._model)
        for model in (self._model, evaluated):
            self._contract.check(model.prunable_convolutions(), f"after epoch {epoch:g}", expected)
        self._contract.extend(self._model.prunable_convolutions(), expected)
        return self._contract.promised(expected)

    def _expected_sparsity(self, epoch: float) -> dict[str, float]:
        return self._recipe.expected_sparsity(self._model, epoch, self._start)

    def _batches(self) -> Iterator[Batch]:
        """This process's shares of all batches from the current position on, without end."""
        steps, nothing = len(self._data.train), no_images(self._data.imgsz)
        epoch, taken = divmod(self._position.batches, steps)
        while True:
            if not taken:
                last = last_mosaic(self._config, self._recipe.epochs, self._recipe.quantization_start)
                self._position.mosaic = (self._now + steps) / steps <= last
            self._share.set_epoch(epoch, skip=taken, mosaic=self._position.mosaic)
            batches = iter(self._share)
            for _ in range(taken, steps):
                self._position.batches += 1
                yield next(batches, nothing)  # this process's last share of an epoch may have no image
            epoch, taken = epoch + 1, 0

    def _as_input(self, batch: Batch) -> Tensor:
        images = batch.images.to(self._fabric.device, non_blocking=True)
        return as_input(images, self._precision.memory_format)

    def _on_device(self, model: YOLOv5) -> YOLOv5:
        return model.to(self._fabric.device).to(memory_format=self._precision.memory_format)

    def _set_learning_rate(self, epoch: float) -> None:
        """Set the rate of the trainer's own schedule: linear warm-up, then cosine to a twentieth."""
        warmup, total = self._config.warmup, self._recipe.epochs
        if epoch < warmup:
            factor = max(0.01, epoch / warmup)
        else:
            share = (epoch - warmup) / max(1e-9, total - warmup)
            factor = 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * factor

    def _set_momentum(self, epoch: float) -> None:
        """Let SGD's momentum rise in a line during the warm-up."""
        config = self._config
        if config.warmup_momentum is None or "momentum" not in self._optimizer.defaults:
            return
        share = min(1.0, epoch / config.warmup) if config.warmup else 1.0
        first = min(config.warmup_momentum, config.momentum)
        for group in self._optimizer.param_groups:
            group["momentum"] = first + share * (config.momentum - first)

    def _learning_rates(self) -> dict[str, float]:
        """The learning rate of the weights, and that of the biases where a recipe sets another."""
        weights, biases = (float(self._optimizer.param_groups[g]["lr"]) for g in (WEIGHTS, BIASES))
        return {"lr": weights} if biases == weights else {"lr": weights, "lr/biases": biases}
