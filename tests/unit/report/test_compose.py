"""What a report says of a run, from its records alone."""

from __future__ import annotations

from types import SimpleNamespace

from sparse_exp.files import write_text
from sparse_exp.report import compose
from sparse_exp.runs.directory import Run, StageRecord


def source_of(tmp_path, **facts) -> SimpleNamespace:
    run = Run.create(tmp_path / "run", overwrite=False)
    for stage, found in facts.items():
        run.record(stage, StageRecord("mark", facts=found))
    return SimpleNamespace(run=run)


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    source = source_of(tmp_path)
    words = ["hardware.engines=[openvino,torch]", "name=two words", "seed=1", "paths.run=elsewhere"]
    source.run.update(overrides=words)
    options = """hydra: {runtime: {config_sources: [{provider: command-line, path: /my conf}]}}"""
    write_text(source.run.path / ".hydra" / "hydra.yaml", options)
    assert compose._command(source) == (
        "python -m sparse_exp --config-dir '/my conf' 'hardware.engines=[openvino,torch]' 'name=two words' "
        "seed=1"
    )


def test_whose_weights_the_dense_network_has(tmp_path):
    dense = {"origin": "initial weights", "trained": False}
    source = source_of(tmp_path, export={"dense": dense})
    rows = [{"variant": "sparse"}, {"variant": "dense_int8"}]
    (text,) = compose._dense(source, rows).values()
    assert text.startswith("initial weights;")
    assert "recovery.baseline=auto" in text
    assert compose._dense(source, rows[:1]) == {}
    dense |= {"origin": "the dense baseline x.pt", "trained": True}
    assert list(compose._dense(source, rows).values()) == ["the dense baseline x.pt"]
