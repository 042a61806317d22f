import pytest

from sparse_exp.sweep.naming import sweep_name

GRID = ["-m", "model=yolov5n,yolov5s", "recipe=dense,transfer"]


def test_the_varied_keys_are_in_the_name_and_the_same_command_has_the_same():
    name = sweep_name(GRID)
    assert name.startswith("model-recipe-")
    for flag in ("--multirun", "--multi", "hydra.mode=MULTIRUN"):
        assert sweep_name(["model=yolov5n,yolov5s", "recipe=dense,transfer", flag]) == name


def test_what_a_file_varies_is_in_the_name():
    name = sweep_name(["-m", "+experiment=mine"], {"seed": "0,1", "model.size": "n"})
    assert name.startswith("seed-")
    assert sweep_name(["-m", "+experiment=mine"], {"seed": "0,1,2", "model.size": "n"}) != name
    assert sweep_name(["-m", "recipe=dense,quant"], {"seed": "0,1"}).startswith("recipe-")


@pytest.mark.parametrize(
    "word",
    [
        "sweep.rerun=failed",
        "sweep.trials=40",
        "sweep.max_loss=0.03",
        "launcher=joblib",
        "launcher.jobs=4",
        "hydra.launcher.n_jobs=3",
        "hydra/launcher=joblib",
        "ray.address=10.0.0.1:6379",
        "tracker=none",
        "+tracker.uri=http://somewhere",
        "paths.output=/elsewhere",
    ],
)
def test_how_a_sweep_is_run_does_not_change_its_name(word):
    assert sweep_name([*GRID, word]) == sweep_name(GRID)


@pytest.mark.parametrize(
    "words",
    [
        [*GRID, "seed=1"],
        ["-m", "recipe=dense,transfer", "model=yolov5n,yolov5s"],  # the jobs have other numbers
        ["-m", "model=yolov5n,yolov5m", "recipe=dense,transfer"],
        [*GRID, "--config-dir", "mine"],
        [*GRID, "tracker_name=x"],
        [*GRID, "hydra/sweeper=search"],
    ],
)
def test_what_a_sweep_is_does(words):
    assert sweep_name(words) != sweep_name(GRID)


def test_lists_and_quoted_texts_do_not_vary():
    name = sweep_name(["-m", "stages=[fetch,train]", "name='a,b'", "seed=1,2"])
    assert name.startswith("seed-")


@pytest.mark.parametrize(
    ("word", "start"),
    [
        ("model=glob(yolov5*)", "model-"),
        ("trainer.lr=interval(0.001, 0.1)", "lr-"),
        ("seed=range(3)", "seed-"),
        ("sweep=pareto", "pareto-"),
        ("+experiment=smoke", "sweep-"),
    ],
)
def test_other_ways_to_vary(word, start):
    assert sweep_name(["-m", word]).startswith(start)
