from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_exp.benchmark import Cell, Load
from sparse_exp.benchmark.tuning import Setting, stream_counts, tune
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.engines.timing import Timing
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
            return Timing((found,) * round(streams * self.wall / found), self.wall, 0.0, stable=True)

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
    assert [one.get("gain") for one in found.tries] == [None, 2.0, None]
    cold, warm = (1.0, 3.0, 1), (1.0, 0.0, 1)  # a third of a try each; the warm-up is no longer than the try
    beside_the_best, beside_the_defaults = [cold, *[warm] * 5], [cold, *[warm] * 9]
    slower = beside_the_best[:2]  # one turn is enough
    assert bench.calls == [cold, *beside_the_best, *slower, *beside_the_defaults]


def test_a_turn_has_twenty_inferences_as_far_as_four_times_its_seconds_suffice():
    bench = Bench(dict.fromkeys([(1, None), (1, 9)], 0.1))
    search(SYNC, bench, [{}, {"a": 9}], HardwareConfig("x", tune_s=3.0))
    assert [seconds for seconds, *_ in bench.calls] == [1.0, pytest.approx(2.0), pytest.approx(2.0)]
    bench = Bench(dict.fromkeys([(1, None), (1, 9)], 0.9))
    search(SYNC, bench, [{}, {"a": 9}], HardwareConfig("x", tune_s=3.0))
    assert [seconds for seconds, *_ in bench.calls] == [1.0, 4.0, 4.0]


def speeding(bench, factor):
    """Engines as those of a bench, with latencies times a factor and a share waited: of setting and call."""
    calls = []

    def opened(setting):
        engine = bench(setting)
        quiet = engine.measure

        def measure(*arguments, **options):
            slower, waited = factor(setting, len(calls))
            calls.append(setting)
            timing = quiet(*arguments, **options)
            latencies = tuple(slower * latency for latency in timing.latencies)
            return replace(timing, latencies=latencies, waited=waited)

        engine.measure = measure
        return engine

    return opened


def tuned(opened, *options):
    cell = Cell("openvino", "dense", Path("m.onnx"), SYNC)
    return tune(cell, IMAGES, HARDWARE, opened, lambda _: [{}, *options]).setting


@pytest.mark.parametrize("slow_calls", [{1}, {3}, {5, 6}, {9, 12}])
def test_a_turn_that_something_disturbs_is_measured_again(slow_calls):
    disturbed = speeding(
        Bench({(1, None): 0.02, (1, 1): 0.015}),
        lambda _, call: (2.0, 0.4) if call in slow_calls else (1.0, 0.0),
    )
    assert tuned(disturbed, {"a": 1}) == Setting(1, {"a": 1})


def test_a_drift_of_the_machine_does_not_change_the_choice():
    drifting = speeding(Bench({(1, None): 0.02, (1, 1): 0.015}), lambda _, call: (1.0 + call / 20, 0.0))
    assert tuned(drifting, {"a": 1}) == Setting(1, {"a": 1})


def test_of_equal_settings_the_defaults_are_chosen_whatever_the_noise():
    draw, chosen = np.random.default_rng(0), []
    for _ in range(200):
        noisy = speeding(
            Bench({(1, None): 0.02, (1, 1): 0.02, (1, 2): 0.02}), lambda *_: (draw.lognormal(0, 0.1), 0.0)
        )
        chosen.append(tuned(noisy, {"a": 1}, {"a": 2}))
    assert sum(bool(setting.options) for setting in chosen) <= 6  # 3 % at 10 % noise


def test_what_won_by_chance_loses_the_last_round():
    lucky = speeding(
        Bench({(1, None): 0.02, (1, 1): 0.02}),
        lambda setting, call: (0.8 if setting.options and call < 9 else 1.0, 0.0),
    )
    assert tuned(lucky, {"a": 1}) == Setting(1, {})


def test_options_are_added_to_those_that_have_won():
    seconds = {(1, None): 0.02, (1, 1): 0.015}
    bench = Bench(seconds)
    both = speeding(bench, lambda setting, _: (0.8 if setting.options.get("b") else 1.0, 0.0))
    assert tuned(both, {"a": 1}, {"b": True}) == Setting(1, {"a": 1, "b": True})


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
