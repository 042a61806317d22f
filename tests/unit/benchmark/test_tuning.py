from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_exp.benchmark import Cell, Load
from sparse_exp.benchmark.tuning import Setting, stream_counts, tune
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.errors import EngineError

IMAGES = np.zeros((1, 3, 32, 32), np.uint8)
HARDWARE = HardwareConfig("x", tune_s=3.0, warmup_s=5.0)
SYNC, MANY = Load("b1", "sync", 1, 1, 4), Load("b8_throughput", "throughput", 8, None, 4)


class Bench:
    """Engines whose inferences take as long as a table says, by streams and the option ``a``."""

    def __init__(self, seconds, wall=1.0):
        self.seconds, self.wall, self.open, self.calls = seconds, wall, [], []

    def __call__(self, setting):
        found = self.seconds[setting.streams, setting.options.get("a")]
        if isinstance(found, str):
            raise EngineError(found)
        engine = SimpleNamespace(setting=setting, close=lambda: self.open.remove(engine))

        def measure(images, seconds, *, warmup, streams):
            self.calls.append((seconds, warmup, streams))
            return SimpleNamespace(latencies=(found,) * round(streams * self.wall / found), wall=self.wall)

        engine.measure = measure
        self.open.append(engine)
        return engine


def search(load, bench, space, hardware=HARDWARE):
    cell = Cell("openvino", "dense", Path("m.onnx"), load)
    return tune(cell, IMAGES, hardware, bench, lambda streams: space)


def test_the_fastest_option_is_chosen_and_only_its_engine_stays_open():
    bench = Bench({(1, None): 0.02, (1, 1): 0.01, (1, 2): 0.04})
    found = search(SYNC, bench, [{}, {"a": 1}, {"a": 2}])
    assert found.setting == Setting(1, {"a": 1})
    assert bench.open == [found.engine]
    assert [(one["options"], one["latency_p50_ms"]) for one in found.tries] == [
        ({}, 20.0),
        ({"a": 1}, 10.0),
        ({"a": 2}, 40.0),
    ]
    assert found.tries[1]["items_per_s"] == pytest.approx(100)
    cold, warm = (1.0, 3.0, 1), (1.0, 0.0, 1)  # a third of a try each; the warm-up is no longer than the try
    beside_the_best = [cold, *[warm] * 5]
    assert bench.calls == [cold, warm, warm, *beside_the_best, *beside_the_best]


def test_where_one_inference_is_longer_than_a_try_one_turn_is_enough():
    bench = Bench({(1, None): 4.0, (1, 1): 3.5}, wall=7.0)
    assert search(SYNC, bench, [{}, {"a": 1}]).setting == Setting(1, {"a": 1})
    assert len(bench.calls) == 1 + 2


@pytest.mark.parametrize("slow_turns", [{1}, {2}, {3, 4, 5, 6, 7, 8}])
def test_neither_a_disturbance_nor_a_drift_of_the_machine_changes_the_choice(slow_turns):
    bench = Bench({(1, None): 0.02, (1, 1): 0.015})
    opened, turns = bench.__call__, []

    def drifting(setting):
        engine = opened(setting)
        quiet = engine.measure

        def measure(*arguments, **options):
            turns.append(setting)
            timing = quiet(*arguments, **options)
            slower = 2.0 if len(turns) - 1 in slow_turns else 1.0
            timing.latencies = tuple(slower * latency for latency in timing.latencies)
            return timing

        engine.measure = measure
        return engine

    cell = Cell("openvino", "dense", Path("m.onnx"), SYNC)
    assert tune(cell, IMAGES, HARDWARE, drifting, lambda _: [{}, {"a": 1}]).setting == Setting(1, {"a": 1})


def test_the_defaults_stay_where_nothing_is_clearly_faster():
    found = search(SYNC, Bench({(1, None): 0.02, (1, 1): 0.0199}), [{}, {"a": 1}])
    assert found.setting == Setting(1, {})


def test_throughput_finds_the_streams_first_then_their_options():
    seconds = {(1, None): 0.1, (2, None): 0.125, (4, None): 0.5, (2, 1): 0.1}
    found = search(MANY, Bench(seconds), [{}, {"a": 1}])  # 10, 16 and 8 inferences a second
    assert found.setting == Setting(2, {"a": 1})
    tried = [(one["streams"], one["options"]) for one in found.tries]
    assert tried == [(1, {}), (2, {}), (4, {}), (2, {"a": 1})]
    assert [one["items_per_s"] for one in found.tries] == [80, 128, 64, 160]  # of batches of 8


def test_what_does_not_load_is_skipped_and_its_reason_kept():
    bench = Bench({(1, None): "no such operator", (1, 1): 0.01})
    found = search(SYNC, bench, [{}, {"a": 1}])
    assert found.setting == Setting(1, {"a": 1})
    assert found.tries[0]["failed"] == "no such operator"


def test_where_nothing_loads_there_is_no_setting_but_the_reason():
    found = search(SYNC, Bench({(1, None): "no", (1, 1): "not this either"}), [{}, {"a": 1}])
    assert (found.setting, found.engine, str(found.error)) == (None, None, "not this either")


@pytest.mark.parametrize(("tune_it", "space"), [(False, [{}, {"a": 1}]), (True, [{}])])
def test_without_a_choice_nothing_is_timed(tune_it, space):
    bench = Bench({(1, None): 0.02})
    found = search(SYNC, bench, space, HardwareConfig("x", tune=tune_it))
    assert found.setting == Setting(1, {})
    assert found.engine is bench.open[0]
    assert bench.calls == []
    assert len(found.tries) == 1


def test_an_engine_that_dies_while_it_is_timed_is_closed():
    bench = Bench({(1, None): 0.02, (1, 1): 0.01})
    opened = bench.__call__

    def dies(setting):
        engine = opened(setting)
        if setting.options:
            engine.measure = lambda *_, **__: (_ for _ in ()).throw(EngineError("died"))
        return engine

    cell = Cell("openvino", "dense", Path("m.onnx"), SYNC)
    found = tune(cell, IMAGES, HARDWARE, dies, lambda streams: [{}, {"a": 1}])
    assert found.setting == Setting(1, {})
    assert bench.open == [found.engine]


@pytest.mark.parametrize(
    ("streams", "cores", "expected"),
    [(None, 1, [1]), (None, 6, [1, 2, 3, 4, 6]), (None, 16, [1, 2, 4, 8, 16]), (3, 16, [3])],
)
def test_streams_worth_a_try(streams, cores, expected):
    assert stream_counts(Load("k", "throughput", 1, streams, cores)) == expected
