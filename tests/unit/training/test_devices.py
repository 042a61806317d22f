"""What the device decides, with a stand-in for ``torch.cuda``; only tests marked ``gpu`` need a GPU."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse_exp.config.plain import recipe_path
from sparse_exp.config.schema import Experiment, ModelConfig, RecipeConfig, TrainerConfig
from sparse_exp.data.loader import make_loader
from sparse_exp.distributed import peers
from sparse_exp.errors import ConfigError, StageFailed
from sparse_exp.planning import preflight, trial
from sparse_exp.planning.preflight import training_batch
from sparse_exp.recipes.recipe import Recipe
from sparse_exp.training import processes
from sparse_exp.training.devices import choose_device, has_tensor_cores, processes_on
from sparse_exp.training.evaluation import Validation
from sparse_exp.training.memory import no_memory_left
from sparse_exp.training.oneshot import apply_at_once
from sparse_exp.training.precision import Precision, choose_precision
from sparse_exp.training.processes import check_devices
from sparse_exp.yolov5 import YOLOv5

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)
FP32 = Precision(autocast=False, channels_last=True)
EPOCH = "modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 1.0\n"
SLIMMING = "slim.md"


def cuda_with(gpus: int, capability: tuple[int, int] = (8, 0)) -> SimpleNamespace:
    """A stand-in for torch.cuda on a machine with so many GPUs."""
    return SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        get_device_capability=lambda _: capability,
    )


@pytest.mark.parametrize(
    ("wanted", "gpus", "rank", "device"),
    [
        ("auto", 0, 0, "cpu"), ("auto", 2, 0, "cuda:0"), ("auto", 2, 1, "cuda:1"), ("cpu", 2, 1, "cpu"),
        ("cuda", 1, 0, "cuda:0"), ("cuda", 4, 3, "cuda:3"), ("cuda:1", 2, 0, "cuda:1"), ("auto", 0, 3, "cpu"),
    ],
)  # fmt: skip
def test_a_process_gets_the_device_that_is_asked_for(wanted, gpus, rank, device):
    assert choose_device(wanted, rank=rank, cuda=cuda_with(gpus)) == torch.device(device)


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [
        ("cuda", 0, r"trainer.device to be auto or cpu, but got .?cuda.*no GPU"),
        ("cuda:2", 2, "one of this machine's 2 GPUs, cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(wanted, gpus, said):
    with pytest.raises(ConfigError, match=said) as caught:
        choose_device(wanted, cuda=cuda_with(gpus))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "autocast", "tf32"),
    [
        (SECOND, (9, 0), "auto", True, True),
        (SECOND, (8, 0), "fp32", False, False),
        (SECOND, (8, 6), "bf16", True, True),
        (SECOND, (7, 5), "auto", False, False),
        (SECOND, (7, 0), "bf16", True, False),
        (CPU, (9, 0), "auto", False, False),
    ],
)
def test_precision_is_asked_of_the_device(device, capability, precision, autocast, tf32):
    """bfloat16 in hardware of the CPU says nothing of a GPU, and the other way round."""
    cuda, trainer = cuda_with(2, capability), TrainerConfig(precision=precision)
    chosen = choose_precision(trainer, has_bf16=device.type == "cuda", device=device, cuda=cuda)
    assert (chosen.autocast, chosen.tf32) == (autocast, tf32)
    assert ("TF32" in str(chosen)) == tf32
    assert has_tensor_cores(device, cuda=cuda) == (device.type == "cuda" and capability >= (8, 0))


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_set_within_the_block_and_given_back(tf32):
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before, precision = flags(), Precision(autocast=False, channels_last=True, tf32=tf32)
    with precision.on(CPU):
        assert flags() == before
    with precision.on(SECOND):
        assert flags() == (tf32, tf32)
    assert flags() == before


def experiment(**trainer) -> Experiment:
    return Experiment(
        name="x",
        model=ModelConfig(name="yolov5n", size="n"),
        recipe=RecipeConfig(name="r", file="r.md"),
        trainer=TrainerConfig(**{"batch_size": 8, **trainer}),
    )


@pytest.mark.parametrize(
    ("trainer", "gpus", "refused"),
    [
        ({"devices": 4}, 0, None), ({"devices": 4}, 4, None), ({"devices": 4}, 2, "at most the 2 GPUs"),
        ({"devices": 4, "device": "cpu"}, 2, None), ({"device": "cuda"}, 0, "no GPU"),
        ({"device": "cuda:1"}, 1, "1 GPUs"),
    ],
)  # fmt: skip
def test_devices_that_are_not_there_are_refused_before_the_training(trainer, gpus, refused):
    asked, recipe = experiment(**trainer), Recipe(EPOCH)
    if refused is None:
        check_devices(asked, recipe, cuda=cuda_with(gpus))
        return
    with pytest.raises(ConfigError, match=refused):
        check_devices(asked, recipe, cuda=cuda_with(gpus))


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Recipe.from_file(recipe_path("dense.md"), {"num_epochs": 24}), "2 epochs, {} steps of {} (a share"),
        (Recipe(EPOCH), "0.5 epochs, {} steps of {} (trainer.warmup)"),
    ],
)
def test_the_warm_up_is_said_in_steps(digits, recipe, wanted):
    asked = experiment(batch_size=4)
    per_epoch = -(-len(digits.splits["train"]) // 4)
    warm = round(float(wanted.split()[0]) * per_epoch)
    said = preflight._warmup(asked, recipe, digits)
    assert said.startswith(wanted.format(warm, round(recipe.epochs * per_epoch)))


def test_copies_of_the_images_in_the_memory_of_each_process_are_said(digits, monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda: 2e9)
    asked = experiment(devices=4)
    asked.dataset.imgsz, asked.dataset.cache = 1024, "ram"
    (said,) = preflight._copies(asked, digits)
    images = len(digits.splits["train"])
    assert f"each of 4 processes, {4 * images * 3 * 1024 * 1024 / 1e9:.1f} GB in all; 2.0 GB are free" in said
    assert "dataset.cache=disk" in said
    for change in ({"cache": "disk"}, {"cache": "auto"}):
        assert not [*preflight._copies(replace(asked, dataset=replace(asked.dataset, **change)), digits)]
    asked.trainer.devices = 1
    assert not [*preflight._copies(asked, digits)]


@pytest.mark.parametrize(("device", "images"), [(CPU, 8), (SECOND, 2)])
def test_the_trial_runs_what_one_process_has_for_itself(digits, monkeypatch, device, images):
    monkeypatch.setattr(preflight, "choose_device", lambda *_: device)
    asked = experiment(devices=4)
    asked.dataset.imgsz = 64
    assert len(training_batch(asked, digits).images) == images
    assert processes_on(device, 4) == 8 // images


@pytest.mark.parametrize(("device", "wanted"), [(CPU, 8), (SECOND, 16)])
def test_memory_is_that_of_one_process(monkeypatch, device, wanted):
    """Four processes share a batch; on GPUs each has memory of its own, here for four images."""
    rig = SimpleNamespace(enter=lambda **_: None, device=device)
    monkeypatch.setattr(trial, "_Rig", lambda *_: rig)
    monkeypatch.setattr(trial, "_first", lambda _, count: count)
    monkeypatch.setattr(trial, "_bytes_per_image", lambda *_: 10.0)
    monkeypatch.setattr(trial, "free_bytes", lambda _: 40.0 if device.type == "cuda" else 80.0)
    trainer = TrainerConfig(batch_size=32, devices=4)
    count = trial.images_that_fit(YOLOv5("n", 1), Recipe(EPOCH), None, trainer, FP32, 64, least=4)
    assert count == wanted


@pytest.mark.parametrize(
    ("device", "asked"),
    [(CPU, ("cpu", 1)), (torch.device("cuda", 0), ("cuda", [0])), (SECOND, ("cuda", [1]))],
)
def test_fabric_is_made_for_the_device(monkeypatch, device, asked):
    monkeypatch.setattr(peers, "Fabric", lambda **options: options)
    options = peers.make_fabric(device)
    assert (options["accelerator"], options["devices"]) == asked


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (2, "nccl")])
def test_processes_exchange_numbers_on_their_devices(monkeypatch, tmp_path, gpus, backend):
    seen = []
    monkeypatch.setattr(
        processes, "choose_device", lambda name, rank: choose_device(name, rank=rank, cuda=cuda)
    )
    monkeypatch.setattr(processes.dist, "init_process_group", lambda name, **_: seen.append(name))
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: None)
    cuda = cuda_with(gpus)
    with processes._process_group(1, 2, str(tmp_path / "meeting"), {"config": TrainerConfig()}):
        assert seen == [backend]


def test_batches_are_pinned_where_a_gpu_fetches_them(digits):
    samples = digits.splits["val"]
    for pin in (False, True):
        loader = make_loader(samples, 10, imgsz=64, batch_size=4, train=False, pin_memory=pin)
        assert loader.pin_memory == pin
        assert pickle.loads(pickle.dumps(loader)).pin_memory == pin
        assert loader.share(0, 2).pin_memory == pin


def test_a_step_computes_where_its_fabric_is(tiny_trainer, tiny_data):
    trainer, batch = tiny_trainer(EPOCH), next(iter(tiny_data.train))
    trainer._fabric = SimpleNamespace(device=torch.device("meta"))
    assert trainer._as_input(batch).device.type == "meta"
    assert batch.images.device.type == "cpu"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."), MemoryError(),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_memory_that_runs_out_is_one_line(error):
    with pytest.raises(StageFailed) as caught, no_memory_left("Evaluating", "Make it smaller"):
        raise error
    assert str(caught.value) == "Evaluating ran out of memory. Make it smaller, or free some memory."


def test_another_error_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes differ"), no_memory_left("Evaluating", "Do"):
        raise RuntimeError("shapes differ")


class Hungry(YOLOv5):
    """A detector for whose images there is no memory."""

    def forward(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_evaluation_and_one_shot_say_that_memory_ran_out(tiny_data, tmp_path):
    hungry = Hungry("n", 10)
    with pytest.raises(
        StageFailed, match=r"^Evaluating test ran out of memory\. Make trainer.val_batch_size"
    ):
        tiny_data.val.evaluate_model(hungry, description="Evaluating test")
    quantize = (
        f"{EPOCH}  - !QuantizationModifier\n    start_epoch: 0.0\n"
        "    ignore: [SiLU, BatchNorm2d, MaxPool2d, Upsample, Concat]\n"
    )
    with pytest.raises(
        StageFailed, match=r"^Applying the recipe ran out of memory\. Make trainer.val_batch_size"
    ):
        apply_at_once(Hungry("n", 10), Recipe(quantize), tiny_data, FP32, weights=tmp_path)


def test_a_training_says_that_memory_ran_out(tiny_data, tmp_path):
    arguments = {
        "model": Hungry("n", 10), "recipe": Recipe(EPOCH), "data": tiny_data, "precision": FP32, "seed": 0,
        "config": TrainerConfig(batch_size=4), "weights": tmp_path,
    }  # fmt: skip
    with pytest.raises(StageFailed, match=r"^Training ran out of memory\. Make trainer.batch_size"):
        processes.fit_together(arguments, devices=1, threads=1, on_epoch=lambda _: None)


@pytest.mark.gpu
def test_a_gpu_trains_and_evaluates_as_a_cpu(tiny_trainer, tiny_data):
    histories = {}
    for device in ("cpu", "cuda"):
        trainer = tiny_trainer(EPOCH, device=device)
        assert trainer.device.type == device
        with FP32.on(trainer.device):
            histories[device] = trainer.fit().history[0]
    for name in ("loss/box", "loss/obj", "loss/cls"):
        assert histories["cuda"][name] == pytest.approx(histories["cpu"][name], rel=1e-2)
    model, gpu = YOLOv5("n", 10), torch.device("cuda")
    validation: Validation = replace(tiny_data.val, conf=0.0)
    wanted = validation.evaluate_model(model)
    with FP32.on(gpu):
        found = validation.evaluate_model(model.to(gpu))
    assert found.map50 == pytest.approx(wanted.map50, abs=0.01)


@pytest.mark.gpu
def test_a_quantized_phase_runs_on_a_gpu(tiny_trainer, recipe_text):
    variables = {"num_epochs": 2, "quantization_epochs": 1, "warmup_epochs": 0.5}
    result = tiny_trainer(recipe_text, variables, device="cuda").fit()
    assert list(result.phases) == ["pruned", "pruned_quant"]
