from __future__ import annotations

import itertools
import random

import pytest

from sparse_exp.sparsity.shares import least_harm


def brute_force(times, harms, budget):
    """The least harm of all combinations that fit."""
    sums = [
        sum(harm[c] for harm, c in zip(harms, chosen, strict=True))
        for chosen in itertools.product(*(range(len(layer)) for layer in times))
        if sum(time[c] for time, c in zip(times, chosen, strict=True)) <= budget + 1e-9
    ]
    return min(sums, default=None)


def total(numbers, chosen):
    return sum(layer[choice] for layer, choice in zip(numbers, chosen, strict=True))


def instance(rng: random.Random, number) -> tuple[list, list]:
    layers = [rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
    return tuple([[number(rng) for _ in range(count)] for count in layers] for _ in range(2))


@pytest.mark.parametrize("seed", range(30))
def test_whole_times_are_solved_exactly(seed):
    rng = random.Random(seed)
    times, harms = instance(rng, lambda r: r.randint(0, 9))
    fastest = sum(map(min, times))
    budget = rng.randint(fastest, sum(map(max, times)) + 1)
    chosen = least_harm(times, harms, budget, steps=max(1, budget - fastest))
    assert total(times, chosen) <= budget
    assert total(harms, chosen) == brute_force(times, harms, budget)


@pytest.mark.parametrize("seed", range(30))
def test_any_times_fit_and_are_the_best_of_a_slightly_smaller_budget(seed):
    rng = random.Random(1000 + seed)
    times, harms = instance(rng, lambda r: r.choice([r.random(), r.random() ** 6]))
    fastest, steps = sum(map(min, times)), 200
    budget = fastest + rng.random() * (sum(map(max, times)) - fastest)
    chosen = least_harm(times, harms, budget, steps=steps)
    assert total(times, chosen) <= budget + 1e-9
    step = (budget - fastest) / steps
    smaller = brute_force(times, harms, budget - step * len(times))
    assert smaller is None or total(harms, chosen) <= smaller + 1e-9
    assert total(harms, chosen) >= brute_force(times, harms, budget) - 1e-9


def test_of_no_time_to_spare_the_fastest_remains():
    assert least_harm([[3.0, 1.0], [1.0, 2.0]], [[0.0, 9.0], [1.0, 0.0]], 2.0) == [1, 0]


def test_a_choice_that_takes_longer_and_harms_more_is_never_made():
    assert least_harm([[2.0, 3.0, 1.0]], [[0.0, 1.0, 5.0]], 3.0) == [0]


def test_of_equal_harms_the_first_is_taken():
    assert least_harm([[2.0, 1.0]], [[0.0, 0.0]], 2.0) == [0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"the fastest choices take 2, more than 1\.5"):
        least_harm([[3.0, 1.0], [1.0]], [[0.0, 1.0], [0.0]], 1.5)
