"""What the experiment's page in MLflow says, for somebody who opens it for the first time."""

from __future__ import annotations

from urllib.parse import quote, urlencode

NOTE_TAG = "mlflow.note.content"
_SPEED = "benchmark/deepsparse/sparse/b1/items_per_s"
_JOBS = "tags.`mlflow.parentRunId` != ''"
# MLflow's page takes a search from its address only when all of these are there. Sorted by start, it shows
# runs below the sweep that they belong to; sorted by anything else, side by side.
_VIEW = {
    "orderByKey": "attributes.start_time",
    "orderByAsc": "false",
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "modelVersionFilter": "All Runs",
    "datasetsFilter": "W10=",  # an empty list
    "workflowType": "machine_learning",  # or else its page for language models opens
}
_TEXT = """\
**{sweeps}** · **{jobs}** · **{accurate}** · **{fast}** · **{charts}** · **{failed}**

## How to read the table

A sweep is one run with its jobs below it: the **+** before its name unfolds them, and its own page carries \
the table, the Pareto front and the pictures of all of them. A run that is in no sweep stands alone. Choose \
what to see under *Columns*: parameters are the whole configuration (`model.size`, `recipe.name`, \
`trainer.lr` ...), tags say what a run is (`model`, `recipe`, `dataset`, `hardware`, `sweep`). The chart \
view draws what is in the table; *Add chart* has scatter and parallel coordinates. A failed run says why \
in its description.

Metrics at step 100 x epoch are of that epoch; the last value is that of the final model.

## What the metrics mean

| metric | meaning |
|---|---|
| `val/map50`, `val/map50_95` | COCO mAP of the final torch model on the validation split, 0 to 1 |
| `test/map50`, `test/map50_95` | the same on the test split, where there is one |
| `deployed/ENGINE/map50` | mAP of the exported file, run in that engine: the accuracy of what is shipped |
| `recovery/map50` | deployed mAP50 over that of the dense counterpart, with `recovery.baseline` |
| `sparsity/prunable`, `sparsity/total` | share of zeros in prunable convolutions, in all of them, 0 to 1 |
| `sparsity/macs` | share of the multiplications that meet a zero, 0 to 1 |
| `size/macs`, `size/dense_macs` | multiplications of an image, 1e9; with all channels |
| `sparsity/onnx` | as prunable, in the exported file |
| `quantized/convolutions` | convolutions that compute on 8-bit integers in the exported file |
| `size/onnx_mb`, `size/onnx_gzip_mb` | of the deployed file, as it is and compressed; 1 MB = 1e6 bytes |
| `size/dense_onnx_mb`, `size/checkpoint_mb` | of the dense baseline's file, of the checkpoint |
| `benchmark/ENGINE/VARIANT/bN/items_per_s` | images per second at batch N, one inference after the other \
(`bN_throughput`, `b1_asyncS`: in several streams); `sparse` is what is deployed, `sparse_fp32` the same \
before it was quantized, `dense` the network without zeros in fp32, `dense_int8` that in 8 bits |
| `.../latency_p50_ms`, `p25` to `p999` | of one inference of a batch, milliseconds |
| `.../peak_rss_mb` | most memory of the engine's process |
| `.../spread` | (largest - smallest) / median of items/s over the repeats; less is no difference |
| `verify/ENGINE/...` | how far the exported file's outputs are from torch's |
| `time/STAGE_s` | wall seconds of a stage |

The same runs in a terminal, with the Pareto front marked: `python -m sparse_exp.compare`. This text is made \
once; change it as you like.
"""


def experiment_note(experiment_id: str) -> str:
    """The description of an experiment: links to views of it, how to read its table, what the metrics mean.

    The links are relative to MLflow's page, so that they work on any server.

    Args:
        experiment_id: MLflow's name of the experiment.

    Returns:
        Markdown, below the 5000 characters that MLflow takes.
    """
    views = {
        "sweeps": ("Sweeps", {"searchFilter": "tags.`sparse_exp.kind` = 'sweep'"}),
        "jobs": (
            "Jobs of sweeps",
            {"searchFilter": f"{_JOBS} and attributes.status = 'FINISHED'", **_by("val/map50")},
        ),
        "accurate": ("Most accurate", {**_finished("val/map50"), **_by("val/map50")}),
        "fast": ("Fastest", {**_finished(_SPEED), **_by(_SPEED)}),
        "charts": ("Charts", {**_finished("val/map50"), **_by("val/map50"), "compareRunsMode": "CHART"}),
        "failed": (
            "Failed",
            {"searchFilter": "attributes.status = 'FAILED'", "orderByKey": "attributes.end_time"},
        ),
    }
    links = {key: f"[{text}]({_address(experiment_id, view)})" for key, (text, view) in views.items()}
    return _TEXT.format(**links)


def _finished(metric: str) -> dict[str, str]:
    return {"searchFilter": f"attributes.status = 'FINISHED' and metrics.`{metric}` >= 0"}


def _by(metric: str) -> dict[str, str]:
    return {"orderByKey": f"metrics.`{metric}`"}


def _address(experiment_id: str, view: dict[str, str]) -> str:
    return f"#/experiments/{experiment_id}/runs?{urlencode({**_VIEW, **view}, quote_via=quote, safe='')}"
