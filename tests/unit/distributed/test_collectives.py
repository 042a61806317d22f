"""Two processes, each with its share of a batch, against one with all of it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparse_exp.config.schema import LossConfig
from sparse_exp.distributed import collectives
from sparse_exp.quantization.modules import Quantizer
from sparse_exp.quantization.scheme import TensorScheme
from sparse_exp.recipes.distillation import detection_distillation
from sparse_exp.yolov5 import DetectionLoss

FORK = multiprocessing.get_context("fork")  # torch is imported then
SHARES = {"3 and 1": (3, 1), "all and none": (4, 0)}  # images of each process
ANCHORS = torch.tensor([[[1.2, 1.6], [2.0, 3.8], [4.1, 2.9]]] * 3)
TARGETS = torch.tensor(
    [[0, 1, 0.3, 0.4, 0.5, 0.6], [0, 0, 0.7, 0.2, 0.2, 0.3],
     [2, 1, 0.5, 0.5, 0.4, 0.2], [3, 0, 0.1, 0.9, 0.2, 0.2]]
)  # fmt: skip


def normalize(share: slice) -> dict[str, Any]:
    """Two batches through a batch norm; the second, with its gradients."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).double()
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(norm)
    collectives.synchronize_statistics(model)
    x = 3 + 2 * torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    upstream = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    model(x[0, share].to(memory_format=torch.channels_last))
    own = x[1, share].clone().requires_grad_()
    out = model(own)
    (out * upstream[share]).sum().backward()
    collectives.sum_gradients(torch.optim.SGD(model.parameters(), 0.1))
    weights = {name: p.grad for name, p in norm.named_parameters()}
    return {"out": out.detach(), "of x": own.grad, "weights": weights, "state": norm.state_dict()}


def observe(share: slice) -> dict[str, Any]:
    """The range of an activation after two batches."""
    torch.manual_seed(0)
    model = nn.Module()
    model.quant = Quantizer(TensorScheme())
    model.quant.enabled = model.quant.observing = True
    x = torch.randn(2, 4, 2, 2, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    outs = [model.quant(batch[share]) for batch in x]
    return {"out": outs[1], "state": model.state_dict()}


def learn(share: slice) -> dict[str, Any]:
    """The losses of raw predictions, alone and from a teacher."""
    torch.manual_seed(0)
    maps = [torch.randn(4, 3, side, side, 7) for side in (8, 4, 2)]
    teacher = [torch.randn_like(m)[share] for m in maps]
    raw = [m[share].clone().requires_grad_() for m in maps]
    own = TARGETS[(TARGETS[:, 0] >= share.start) & (TARGETS[:, 0] < share.stop)].clone()
    own[:, 0] -= share.start
    loss, parts = DetectionLoss(ANCHORS, 2, LossConfig(), 64)(raw, own)
    taught = detection_distillation(raw, teacher, 2.0)
    (loss + taught).backward()
    sums = {"loss": loss.detach(), "taught": taught.detach(), **parts}
    return {"sums": collectives.total(torch.stack(list(sums.values()))), "of raw": [r.grad for r in raw]}


WORK = {work.__name__: work for work in (normalize, observe, learn)}


def meet(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for name, (first, second) in SHARES.items():
        share = slice(0, first) if rank == 0 else slice(first, first + second)
        results |= {(kind, name): work(share) for kind, work in WORK.items()}
    drifted = {"same": torch.ones(2), "other": torch.full((), float(rank)), "flag": torch.tensor([True])}
    results["differing"] = collectives.differing_tensors(drifted)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def met(tmp_path_factory) -> list[dict[Any, Any]]:
    """What the two found."""
    folder = tmp_path_factory.mktemp("meeting")
    processes = [FORK.Process(target=meet, args=(rank, folder), daemon=True) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", SHARES)
def test_a_batch_norm_is_that_of_the_whole_batch(met, name):
    whole, (one, two) = normalize(slice(0, 4)), (results["normalize", name] for results in met)
    close = {"rtol": 1e-11, "atol": 1e-12}
    for key in ("out", "of x"):
        torch.testing.assert_close(torch.cat([one[key], two[key]]), whole[key], **close)
    for part in (one, two):
        for key in ("weights", "state"):
            torch.testing.assert_close(part[key], whole[key], **close)
    assert all(torch.equal(one["state"][key], two["state"][key]) for key in one["state"])


@pytest.mark.parametrize("name", SHARES)
def test_an_activation_gets_the_range_of_the_whole_batch(met, name):
    whole, (one, two) = observe(slice(0, 4)), (results["observe", name] for results in met)
    assert torch.equal(torch.cat([one["out"], two["out"]]), whole["out"])
    for part in (one, two):
        assert all(torch.equal(part["state"][key], whole["state"][key]) for key in whole["state"])


@pytest.mark.parametrize("name", SHARES)
def test_losses_of_the_shares_add_up_to_that_of_the_whole_batch(met, name):
    whole, (one, two) = learn(slice(0, 4)), (results["learn", name] for results in met)
    torch.testing.assert_close(one["sums"], whole["sums"], rtol=1e-6, atol=1e-7)
    for level in range(3):
        both = torch.cat([one["of raw"][level], two["of raw"][level]])
        torch.testing.assert_close(both, whole["of raw"][level], rtol=1e-5, atol=1e-9)


def test_what_has_drifted_apart_is_named(met):
    assert [results["differing"] for results in met] == [["other"], ["other"]]


def test_alone_nothing_is_replaced_or_copied():
    norm, values = nn.BatchNorm2d(2), torch.ones(3)
    collectives.synchronize_statistics(norm)
    assert "forward" not in vars(norm)
    assert collectives.total(values) is values
    assert collectives.total_of([1.5, 2]) == [1.5, 2]
    assert (collectives.size(), collectives.rank()) == (1, 0)
    assert collectives.differing_tensors({"a": values}) == []
