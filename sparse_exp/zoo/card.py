"""The model card ``model.md``: what the model is, with the front matter that SparseZoo's client reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sparse_exp.config.imgsz import in_words
from sparse_exp.runs.deployment import MODEL
from sparse_exp.sources.local import CARD
from sparse_exp.text import in_markdown, markdown_table

_SHOWN = {
    "val/map50": "mAP50, validation split, torch",
    "val/map50_95": "mAP50-95, validation split, torch",
    "test/map50": "mAP50, test split, torch",
    "deployed/deepsparse/map50": "mAP50 deployed in DeepSparse",
    "deployed/onnxruntime/map50": "mAP50 deployed in ONNX Runtime",
    "deployed/openvino/map50": "mAP50 deployed in OpenVINO",
    "recovery/map50": "share of the dense counterpart's mAP50",
    "sparsity/macs": "share of the multiplications that meet a zero",
    "size/macs": "multiplications of an image, 1e9",
    "size/dense_macs": "multiplications of the dense network, 1e9",
    "size/onnx_mb": "ONNX file, MB",
    "size/onnx_gzip_mb": "ONNX file compressed, MB",
    "benchmark/deepsparse/sparse/b1/items_per_s": "images/s in DeepSparse, batch 1",
}


def write_card(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Write the model card.

    Args:
        directory: of the model. How to run it is described if it holds ``model.onnx``.
        metadata: what ``model.json`` says.
    """
    deployed = (directory / MODEL).is_file()
    parts = [
        _front_matter(metadata),
        _summary(metadata),
        *_numbers(metadata),
        _uses(metadata, deployed=deployed),
    ]
    parts += _licences(metadata)
    (directory / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(metadata: Mapping[str, Any]) -> str:
    domain, sub_domain, architecture, framework, repo, dataset, tag = (
        str(metadata["stub"]).removeprefix("zoo:").split("/")
    )
    name, _, sub = architecture.partition("-")
    fields = {
        "domain": domain,
        "sub_domain": sub_domain,
        "architecture": name,
        "sub_architecture": sub,
        "framework": framework,
        "repo": repo,
        "train_dataset": dataset,
        "sparse_tag": tag,
        "stub": metadata["stub"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(metadata: Mapping[str, Any]) -> str:
    zeros = f"{metadata['sparsity']:.1%} zeros in the prunable convolutions"
    blocks = ", in blocks of 4 input channels" if metadata["block4"] else ""
    numbers = "8-bit (quantization-aware training)" if metadata["quantized"] else "floating point"
    classes, slim = metadata["classes"], metadata.get("work", 1.0) < 1.0
    shown = ", ".join(map(in_markdown, classes[:10])) + (
        f" and {len(classes) - 10} more" if len(classes) > 10 else ""
    )
    rows = {
        "stub": f"`{metadata['stub']}`",
        "short": f"`{metadata['short']}`",
        "sparsity": zeros + blocks,
        **({"channels": f"{metadata['work']:.1%} of the work of the stock size is left"} if slim else {}),
        "numbers": numbers,
        "image size": f"{in_words(metadata['imgsz'])} px" if metadata.get("imgsz") else "not recorded",
        f"classes ({len(classes)})": shown,
        "recipe": metadata.get("recipe") or "not recorded",
        "start weights": metadata.get("origin") or "not recorded",
        "published": f"{metadata['published']} by {metadata['by']}, sparse_exp {metadata['sparse_exp']}",
    }
    title = f"# YOLOv5{metadata['size']} on {metadata['dataset']}: {metadata['tag']}"
    return f"{title}\n\n{markdown_table(('', ''), rows.items(), right=())}"


def _numbers(metadata: Mapping[str, Any]) -> Iterator[str]:
    metrics = metadata["metrics"]
    rows = [(label, f"{metrics[key]:.4g}") for key, label in _SHOWN.items() if key in metrics]
    if rows:
        host = f" Throughput: {metadata['host']}." if metadata.get("host") else ""
        versions = ", ".join(f"{name} {number}" for name, number in metadata["engines"].items())
        where = f"Engines: {versions}.{host} All numbers are in metrics.yaml."
        yield f"## Measured\n\n{markdown_table(('', ''), rows)}\n\n{where}"


def _uses(metadata: Mapping[str, Any], *, deployed: bool) -> str:
    start = f"    python -m sparse_exp model=yolov5{metadata['size']} 'model.weights={metadata['stub']}'"
    texts = ["## Use", f"Start a transfer from it:\n\n{start}"]
    if deployed:
        texts.append(
            "Run it: `model.onnx` takes uint8 RGB images (N, 3, S, S) and gives float32 (N, A, 5 + nc): x, "
            "y, w, h in pixels, objectness, class scores. DeepSparse, with DIR for this directory:\n\n"
            "    from deepsparse import Pipeline\n"
            "    detect = Pipeline.create(task='yolo', model_path='DIR',\n"
            "                             class_names='DIR/deployment/class_names.json')\n"
            "    detect(images=[image])  # uint8 RGB (H, W, 3)"
        )
    return "\n\n".join(texts)


def _licences(metadata: Mapping[str, Any]) -> Iterator[str]:
    if metadata.get("licence"):
        yield "## Licences\n\n" + "\n".join(f"- {text}" for text in metadata["licence"])
