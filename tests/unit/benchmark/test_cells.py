from pathlib import Path

import pytest

from sparse_exp.benchmark import cells_of, loads_of
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import Impossible


def keys(usable=4, **settings):
    return [load.key for load in loads_of(HardwareConfig("x", **settings), usable)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["b1"]),
        ({"batch_sizes": [1, 16]}, ["b1", "b16"]),
        ({"scenarios": ["throughput"], "batch_sizes": [1, 16]}, ["b1_throughput", "b16_throughput"]),
        ({"scenarios": ["throughput"], "streams": [2, 4]}, ["b1_throughput_s2", "b1_throughput_s4"]),
        ({"scenarios": ["async"]}, ["b1_async4"]),
        ({"scenarios": ["async"], "batch_sizes": [16], "streams": [2, 8]}, ["b1_async2", "b1_async8"]),
        ({"cores": [4, 1]}, ["b1", "b1_c1"]),
        (
            {"cores": [2, 1], "scenarios": ["sync", "async"], "streams": [4]},
            ["b1", "b1_async4", "b1_c1", "b1_async4_c1"],
        ),
        (
            {"cores": [2, 1], "scenarios": ["throughput"], "batch_sizes": [16], "streams": [4]},
            ["b16_throughput_s4", "b16_throughput_s4_c1"],
        ),
        ({"cores": [2, 1], "scenarios": ["async"]}, ["b1_async2", "b1_async1_c1"]),
    ],
)
def test_each_load_has_a_name_of_its_own(settings, expected):
    assert keys(**settings) == expected


def test_loads_say_what_their_names_say():
    hardware = HardwareConfig("x", scenarios=["sync", "throughput", "async"], batch_sizes=[16], cores=[2])
    sync, throughput, several = loads_of(hardware, 8)
    assert sync == ("b16", "sync", 16, 1, 2)
    assert throughput == ("b16_throughput", "throughput", 16, None, 2)  # the search finds the streams
    assert several == ("b1_async2", "async", 1, 2, 2)  # one per core


def model_for(engine, variant):
    if (engine, variant) == ("torch", "dense_int8"):
        raise Impossible("torch has none")
    return Path(f"{variant}.{engine}")


def test_the_square_is_every_engine_with_every_variant_under_every_load():
    hardware = HardwareConfig(
        "x", engines=["openvino", "torch"], variants=["dense", "dense_int8"], batch_sizes=[1, 4]
    )
    cells = cells_of(hardware, 2, model_for)
    assert [cell.name for cell in cells] == [
        f"{engine}/{variant}/b{batch}"
        for batch in (1, 4)
        for engine in ("openvino", "torch")
        for variant in ("dense", "dense_int8")
    ]
    impossible = [cell for cell in cells if cell.impossible]
    assert [cell.name for cell in impossible] == ["torch/dense_int8/b1", "torch/dense_int8/b4"]
    assert {(cell.model, cell.impossible) for cell in impossible} == {(None, "torch has none")}
    assert {cell.model for cell in cells if not cell.impossible and cell.variant == "dense_int8"} == {
        Path("dense_int8.openvino")
    }
