from __future__ import annotations

import copy
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import Batch
from sparse_exp.errors import ConfigError
from sparse_exp.hardware import cgroups
from sparse_exp.planning import trial
from sparse_exp.planning.trial import try_steps
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.sparsity.prune import prune_by_magnitude
from sparse_exp.training import memory
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

IMGSZ, CLASSES = 64, 10
CONFIG = TrainerConfig(batch_size=4)
FP32 = Precision(autocast=False, channels_last=True)
SHORT = {"num_epochs": 1, "quantization_epochs": 0.5, "warmup_epochs": 0.25}
ONE_EPOCH = """modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
"""
DISTILLING = f"""{ONE_EPOCH}
  - !DistillationModifier
    start_epoch: 0.0
    hardness: 0.5
    temperature: 2.0
"""
QUANTIZING = f"""{ONE_EPOCH}
  - !QuantizationModifier
    start_epoch: 0.0
    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]
"""
CPU = torch.device("cpu")


@pytest.fixture
def batch(tiny_data):
    return next(iter(tiny_data.train))


@pytest.fixture
def model() -> YOLOv5:
    torch.manual_seed(0)
    model = YOLOv5("n", CLASSES)
    prune_by_magnitude(model.prunable_convolutions(), 0.75)
    return model


@pytest.fixture
def recipe(recipe_text) -> Recipe:
    return Recipe(recipe_text, SHORT)


def test_each_kind_of_step_is_timed(model, recipe, batch):
    tried = try_steps(model, recipe, batch, CONFIG, FP32, IMGSZ)
    assert set(tried.seconds) == set(tried.evaluation) == {"float", "quantized"}
    assert all(0 < seconds < 60 for seconds in (*tried.seconds.values(), *tried.evaluation.values()))
    assert tried.qat_split == 1
    if sys.platform == "linux":
        resident = memory.used_bytes(CPU) / 1e6
        assert all(0.5 * resident < peak < 5 * resident for peak in tried.peak_mb.values())


@pytest.mark.parametrize(("text", "kinds"), [(DISTILLING, {"float"}), (QUANTIZING, {"quantized"})])
def test_recipes_with_one_kind_of_step(model, batch, text, kinds):
    tried = try_steps(model, Recipe(text), batch, CONFIG, FP32, IMGSZ, optimizer="sgd")
    assert set(tried.seconds) == kinds


def states(model: YOLOv5) -> list:
    return [torch.get_rng_state(), np.random.get_state()[1], random.getstate(), *model.state_dict().values()]


def equal(left, right) -> bool:
    return bool((left == right).all()) if hasattr(left, "all") else left == right


def test_nothing_is_changed(model, recipe, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, modules = copy.deepcopy(states(model)), [type(module) for module in model.modules()]
    images, targets = batch.images.clone(), batch.targets.clone()
    try_steps(model, recipe, batch, CONFIG, FP32, IMGSZ)
    assert all(map(equal, before, states(model)))
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert equal(batch.images, images)
    assert equal(batch.targets, targets)
    assert list(tmp_path.iterdir()) == []  # no sparse_logs


def test_a_training_after_it_is_the_same_as_without(tiny_trainer, scripted, recipe_text, batch):
    def weights(*, tried: bool) -> dict[str, torch.Tensor]:
        recipe, trainer = Recipe(recipe_text, SHORT), tiny_trainer(recipe_text, SHORT)  # seeds everything
        if tried:
            try_steps(trainer.model, recipe, batch, CONFIG, FP32, IMGSZ)
        trainer.fit()
        return trainer.model.state_dict()

    scripted(0.5)
    without, after = weights(tried=False), weights(tried=True)
    assert without.keys() == after.keys()
    assert all(torch.equal(without[name], after[name]) for name in without)


class Rig:
    """Steps that hold 100 MB for each image of a part, as far as there is so much."""

    device = CPU

    def __init__(self, free: float) -> None:
        self.free, self.tried, self.forgot = free, [], 0

    def step(self, batch: Batch, split: int) -> None:
        self.tried.append(split)
        if -(-len(batch.images) // split) > self.free:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def forget(self) -> None:
        self.forgot += 1


FOUR = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(0, 6))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("free", "split"), [(4, 1), (3.9, 2), (2, 2), (1.9, 4), (1, 4)])
def test_qat_is_split_where_a_batch_would_not_fit(monkeypatch, caplog, free, split, known):
    """Whether that is foreseen, or seen only when memory runs out."""
    rig = Rig(free)
    monkeypatch.setattr(trial, "_needs", lambda *_: lambda images: images * 100e6 * known)
    monkeypatch.setattr(trial, "free_bytes", lambda _: free * 100e6)
    with caplog.at_level("INFO", logger="sparse_exp"):
        *_, found = trial._fit(rig, FOUR, quantized=True)
    assert found == split
    assert ("split by 2" in caplog.text) is (split > 1)
    assert set(rig.tried) == ({split} if known else {parts for parts in (1, 2, 4) if parts <= split})
    assert rig.forgot == (0 if known else len(set(rig.tried)) - 1)


def test_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(trial, "_needs", lambda *_: lambda images: images * 100e6)
    monkeypatch.setattr(trial, "free_bytes", lambda _: 99e6)
    with pytest.raises(ConfigError) as raised:
        trial._fit(Rig(0.99), FOUR, quantized=True)
    assert str(raised.value) == (
        "Expected the memory for a QAT step over 1 image to be at most the 99 MB that are free, but got "
        "about 100 MB. Make dataset.imgsz smaller, take a smaller model, or free some memory."
    )
    with pytest.raises(ConfigError, match=r"step over 4 images .* 400 MB\. Make trainer\.batch_size"):
        trial._fit(Rig(0.99), FOUR, quantized=False)
    monkeypatch.setattr(trial, "_needs", lambda *_: lambda images: 0)
    with pytest.raises(ConfigError, match="a QAT step over 1 image to fit into memory, but it ran out of it"):
        trial._fit(Rig(0.99), FOUR, quantized=True)


def test_what_a_step_needs_is_foreseen(model):
    """A step over a quarter of a batch is less than the whole, and tells about it."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    images = torch.randint(0, 255, (16, 3, 128, 128), dtype=torch.uint8)
    rig = trial._Rig(model, Recipe(ONE_EPOCH), CONFIG, FP32, 128, "adamw", None)
    rig.enter(quantized=False)
    batch = Batch(images, torch.zeros(0, 6))
    need = trial._needs(rig, batch)(16)
    before = memory.used_bytes(CPU)
    memory.reset_peak(CPU)
    rig.step(batch, 1)
    assert 0.95 < need / (memory.peak_bytes(CPU) - before) < 2.0  # rather too much than too little


OUT_OF_MEMORY = """
import re, resource, sys
import torch
from sparse_exp.config.schema import TrainerConfig
from sparse_exp.data.loader import Batch
from sparse_exp.errors import ConfigError
from sparse_exp.planning import trial
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training import memory
from sparse_exp.training.precision import Precision
from sparse_exp.yolov5 import YOLOv5

torch.set_num_threads(1)
trial._QUICK_S = 0  # time nothing twice
count, imgsz = 4, 160
batch = Batch(torch.randint(0, 255, (count, 3, imgsz, imgsz), dtype=torch.uint8), torch.zeros(0, 6))
config = TrainerConfig(batch_size=count)
rig = trial._Rig(YOLOv5("n", 1), Recipe(sys.argv[1]), config, Precision(False, True), imgsz, "adamw", None)
rig.enter(quantized=True)

def fit(megabytes):
    # parts, or the refusal, with so much memory to take
    memory.used_bytes(rig.device)  # gives back what is free
    held = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(megabytes * 1e6), unlimited))
    try:
        return trial._fit(rig, batch, quantized=True)[2]
    except ConfigError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (unlimited, unlimited))

for parts in (1, 2, 4):  # what oneDNN compiles; it does not always survive a lack of memory for that
    rig.step(batch, parts)
rig.forget()
memory.used_bytes(rig.device)
before = memory.used_bytes(rig.device)
memory.reset_peak(rig.device)
rig.step(batch, 1)
megabytes = 0.85 * (memory.peak_bytes(rig.device) - before) / 1e6
rig.forget()
while (parts := fit(megabytes)) == 1:  # some of what is held can be used again: find where it is too little
    megabytes *= 0.85
print(parts)
print(fit(0))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_that_really_runs_out():
    # Freed memory goes back at once, so that what a process holds is what it uses.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OUT_OF_MEMORY, QUANTIZING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    parts, refusal = done.stdout.splitlines()
    assert parts == "2"
    assert refusal.startswith("Expected a QAT step over 1 image to fit into memory, but it ran out of it.")


def test_errors_that_say_so():
    said = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."
    assert memory.is_out_of_memory(RuntimeError(said))
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_another_error_is_passed_on(model, recipe, batch, monkeypatch):
    monkeypatch.setattr(trial._Rig, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        try_steps(model, recipe, batch, CONFIG, FP32, IMGSZ)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_since_the_reset():
    def peak_of(megabytes: int) -> float:
        before = memory.used_bytes(CPU)
        memory.reset_peak(CPU)
        del_me = torch.ones(megabytes * 250_000)  # float32
        del del_me
        return (memory.peak_bytes(CPU) - before) / 1e6

    assert peak_of(200) == pytest.approx(200, abs=20)
    assert peak_of(50) == pytest.approx(50, abs=20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_was_freed_does_not_hide_what_is_taken():
    torch.ones(5_000_000)  # from now on glibc keeps pieces up to 20 MB when they are freed
    pieces = [torch.ones(2_500_000) for _ in range(20)]
    last = pieces[-1]  # lies behind them
    del pieces
    before = memory.used_bytes(CPU)
    memory.reset_peak(CPU)
    again = [torch.ones(2_500_000) for _ in range(10)]
    assert (memory.peak_bytes(CPU) - before) / 1e6 == pytest.approx(100, abs=15)
    assert len(again) == 10
    assert len(last) == 2_500_000


@pytest.mark.parametrize("version", [1, 2])
def test_a_groups_limit_counts(tmp_path, monkeypatch, version):
    """Files as in the kernel's documents of cgroup v1 and v2."""
    group = tmp_path / ("memory/box" if version == 1 else "box")
    group.mkdir(parents=True)
    limit, usage, cache = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    (group / limit).write_text("3000000\n")
    (group / usage).write_text("2000000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cache} 500000\n")
    (tmp_path / "own").write_text("4:memory:/box/inner\n3:cpuset:/other\n" if version == 1 else "0::/box\n")
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN_GROUP", tmp_path / "own")
    assert memory.free_bytes(CPU) == 1_500_000
    (group / limit).write_text("max\n")
    assert memory.free_bytes(CPU) > 10_000_000
