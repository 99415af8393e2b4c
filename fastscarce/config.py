"""What the commands read: dataclasses filled from YAML files and flags, printed and kept.

Sizes are rows a step over all processes, so a run means the same for any number of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = [
    "BenchDataConfig",
    "DataConfig",
    "DistillConfig",
    "FinetuneConfig",
    "LabelCommandConfig",
    "LabelConfig",
    "ModelConfig",
    "RunConfig",
    "SelftrainConfig",
    "ShowAugmentConfig",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "to_dict",
]


@dataclass
class DataConfig:
    """Where the images come from, and which of their labels may be used.

    Attributes:
        data: `digits` (scikit-learn's, embedded), `folder:PATH` (a sub-folder a class, with
            `unlabelled/` and `test/` if you have them), `table:PATH` (CSV or Parquet),
            `webdataset:PATH` (tar shards), `arrays:PATH` (.npz or .npy) or `idx:PATH` (MNIST's file
            format). PATH may be a pattern of tables, and of shards a URL too.
        unlabelled: More images without labels: a folder, or again `KIND:PATH`.
        image_key: Column of a table, name of an array or extension of a shard's member that holds
            the images. `null` takes the usual names.
        label_key: The same for the labels.
        id_key: The same for ids, of tables and arrays. `null` makes ids of paths or positions.
        labels_per_class: Labels to use of each class, drawn from the seed; the other labels are
            hidden. `null` uses every label.
        labels_file: CSV or Parquet of the images whose labels may be used (`id` or `name`, and
            `label`); `labels_per_class` is not asked then. A run's `split.csv` gives the same split
            again.
        holdout_per_class: Labelled images of each class that train nothing and judge the rounds.
            `null` takes a fifth where a class has at least 20 labels, and otherwise none.
        test_fraction: Part of each class kept for the test, where the data has no test split.
        image_size: Side in pixels that images are brought to. `null` keeps a common size.
        flip: Whether a mirrored image keeps its label; `auto` asks the data set.
        on_error: What to do with an image that can't be read: `skip` leaves it out, `replace` puts
            another one of its label in its place, and `quarantine.csv` lists it.
        pool: Where the decoded images lie: `device`, `host` (in memory), `disk` (a file beside the
            cache, mapped into memory) or `off` (decoded each time); `auto` takes the first that
            they fit in. The results are the same.
        loader: Who decodes: `torch`, or `dali` (NVIDIA DALI, an extra).
        workers: Processes that decode ahead, a stream of batches, or threads of DALI.
    """

    data: str = "digits"
    unlabelled: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    id_key: str | None = None
    labels_per_class: int | None = 4
    labels_file: str | None = None
    holdout_per_class: int | None = None
    test_fraction: float = 1 / 3
    image_size: int | None = None
    flip: Literal["auto", "yes", "no"] = "auto"
    on_error: Literal["raise", "skip", "replace"] = "raise"
    pool: Literal["auto", "device", "host", "disk", "off"] = "auto"
    loader: Literal["torch", "dali"] = "torch"
    workers: int = 2


@dataclass
class ModelConfig:
    """Which network.

    Attributes:
        name: `small_cnn` (8 to 32 pixels), `small_cnn_gn`, any timm name, or `local-dir:PATH`.
        pretrained: Start from timm's pretrained weights.
        dropout: Probability of dropping a feature before the head.
        stochastic_depth: Probability of dropping a residual branch, for timm models that have it.
    """

    name: str = "small_cnn"
    pretrained: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0


@dataclass
class StageConfig:
    """How one model is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Labelled rows a step.
        learning_rate: Rate of the head, and of the backbone unless `backbone_rate` is given.
        backbone_rate: Rate of the backbone's top layer. `null` is the head's.
        layer_decay: Factor of the rate from each layer to the one below it.
        freeze: `backbone` trains the head alone, batch-norm statistics frozen too.
        warmup_steps: Steps of linear warm-up before the cosine.
        optimizer: `sgd` is with Nesterov's momentum 0.9.
        weight_decay: On weights of two or more dimensions.
        ema_decay: Of the weights' moving average, which is the model that a stage returns.
        max_gradient_norm: Gradients are scaled down to this norm. `null` leaves them.
        augmentation: Policy of the labelled views.
        cutmix_probability: Part of the views that a box of their partner is pasted into.
        cutmix_alpha: Both parameters of the Beta distribution of the mixed area.
        label_smoothing: Part of a label spread evenly over the classes.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 0.1
    backbone_rate: float | None = None
    layer_decay: float = 1.0
    freeze: Literal["none", "backbone"] = "none"
    warmup_steps: int = 15
    optimizer: Literal["adamw", "sgd"] = "sgd"
    weight_decay: float = 5e-3
    ema_decay: float = 0.99
    max_gradient_norm: float | None = None
    augmentation: Literal["weak", "standard", "strong"] = "strong"
    cutmix_probability: float = 0.5
    cutmix_alpha: float = 1.0
    label_smoothing: float = 0.0


@dataclass
class StudentConfig(StageConfig):
    """How a student is trained: as any model, and on pseudo-labelled images beside.

    Attributes:
        unlabelled_batch_size: Pseudo-labelled rows a step.
        alpha: Weight of the distillation term; the labels' cross entropy has the rest. At 1 the
            labelled rows are left out.
        temperature: What student and teacher logits are divided by.
        loss: Of the distillation: `kl`, `hard` (cross entropy with the teacher's first class) or
            `dkd`, which tells the label's class from the rest.
    """

    learning_rate: float = 0.2
    weight_decay: float = 2.5e-3
    unlabelled_batch_size: int = 192
    alpha: float = 0.5
    temperature: float = 1.0
    loss: Literal["kl", "hard", "dkd"] = "kl"


@dataclass
class LabelConfig:
    """How a teacher labels the unlabelled images.

    Attributes:
        views: Views whose probabilities are averaged: the plain image, and augmented ones.
        augmentation: Policy of the augmented views.
        align: Bring the mean prediction to the labelled classes' frequencies.
        calibrate: Divide the logits by the temperature that fits the hold-out, where there is one.
        threshold: Least confidence of a kept image.
        keep_per_class: Images kept of each class, repeated where there are fewer. `null` keeps
            all above the threshold, once.
    """

    views: int = 9
    augmentation: Literal["eval", "weak", "standard", "strong"] = "weak"
    align: bool = True
    calibrate: bool = True
    threshold: float = 0.0
    keep_per_class: int | None = None


@dataclass
class RunConfig:
    """How and where it runs.

    Attributes:
        out: Folder of the results.
        seed: Every draw of the run follows from it.
        resume: Go on with the interrupted run in `out`.
        overwrite: Replace what is in `out`.
        mixed_precision: Autocast of the forward pass.
        gradient_accumulation_steps: Pieces that a step's rows are worked off in, to save memory.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines of `metrics.jsonl`.
        tensorboard: Write TensorBoard's event files too.
        cpu: Use the CPU even where there is a GPU.
        threads: CPU threads of a process. `null` leaves PyTorch's choice.
    """

    out: str = "runs/selftrain"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation_steps: int = 1
    checkpoint_every: int = 100
    log_every: int = 10
    tensorboard: bool = True
    cpu: bool = False
    threads: int | None = None


@dataclass
class SelftrainConfig(DataConfig, RunConfig):
    """Labelled images teach a teacher, it labels the rest, a student learns from both; repeat.

    Attributes:
        rounds: Times that the student becomes the teacher.
        baseline: Train the student's network on the labels alone too, for comparison.
        model: The student's network.
        teacher_model: The first teacher's network. `null` is the student's.
        supervised: How the baseline is trained.
        teacher: How the first teacher is trained.
        student: How each student is trained.
        labels: How each teacher labels.
    """

    rounds: int = 3
    baseline: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher_model: ModelConfig | None = None
    supervised: StageConfig = field(
        default_factory=lambda: StageConfig(
            learning_rate=0.2, weight_decay=1e-2, augmentation="weak", cutmix_probability=0.0
        )
    )
    teacher: StageConfig = field(default_factory=StageConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)


@dataclass
class FinetuneConfig(DataConfig, RunConfig):
    """Train a teacher on labelled images: a frozen backbone's head, or all of it.

    Attributes:
        model: The network.
        training: How it is trained.
    """

    out: str = "runs/finetune"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: StageConfig = field(default_factory=StageConfig)


@dataclass
class LabelCommandConfig(DataConfig, RunConfig):
    """Label the unlabelled images with a trained model.

    Attributes:
        teacher: Result folder of `finetune`, `distill` or `selftrain`.
        labels: How it labels.
    """

    out: str = "runs/labels"
    teacher: str = "runs/finetune"
    labels: LabelConfig = field(default_factory=LabelConfig)


@dataclass
class TeacherConfig:
    """Who teaches.

    Attributes:
        teacher: A result folder, a timm name or `local-dir:PATH`; several, joined by commas, are
            an ensemble: the mean of their probabilities.
        teacher_precision: Of the teacher's forward pass.
        teacher_image_size: Side in pixels that views are brought to for the teacher. `null` is the
            one that it was trained at.
        class_map: JSON or YAML file of the teacher's class, or classes, for each class of the data.
    """

    teacher: str = "runs/finetune"
    teacher_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    teacher_image_size: int | None = None
    class_map: str | None = None


@dataclass
class DistillConfig(DataConfig, RunConfig, TeacherConfig):
    """Train a student on labelled images, and on what a teacher says of all.

    What it says is read from a table of `cache build`, asked of the teacher itself, or is the
    pseudo-labels of `label` where neither is given.

    Attributes:
        cache: Table, or folder of tables, of the same data and seed.
        teacher: As of `cache build`. With `cache` it says what the table lacks. Empty: none.
        labels: Result folder of `label`.
        policy: Of the views that the teacher sees, a name or a YAML file. `null` is the table's;
            without a table `student.augmentation`. With `+cutmix` or `+mixup`, or those in the
            table, the teacher sees the student's mixed images, and `student.cutmix_probability` is
            of the labelled ones alone; otherwise what it says of two views is mixed as they are.
        views: After how many epochs an image's first view comes again. `null`: as many as the table
            has; without a table never.
        k: Classes that a teacher without a table is heard of; `null` is 16, or all where fewer. Of
            a table: what its rows have to have; `null` takes what they have.
        preset: `consistent` (the same crop and the same mix for both, KL alone, at least 30
            epochs; without a table the mix is `student.cutmix_probability`'s), `deit` (cross
            entropy with labels and with the teacher's first class, half and half) or `dkd` (at
            T = 4), which set the student's `alpha`, `loss`, `temperature` and `steps`.
        allow_mismatch: Keys, joined by commas, that the table may differ in from this run.
        model: The student's network.
        student: How it is trained.
    """

    out: str = "runs/distill"
    cache: str | None = None
    teacher: str = ""
    labels: str = "runs/labels"
    policy: str | None = None
    views: int | None = None
    k: int | None = None
    preset: Literal["none", "consistent", "deit", "dkd"] = "none"
    allow_mismatch: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)


@dataclass
class ShowAugmentConfig:
    """Draw a sheet of images by view, with what was done to each written under it.

    Attributes:
        policy: Name of a policy, such as `strong+cutmix` or `randaugment(2, 9)`, or a YAML file.
        data: As for training: `digits`, `folder:PATH`, `table:PATH` and so on.
        image_key: As for training.
        label_key: As for training.
        id_key: As for training.
        out: The PNG file.
        images: Rows of the sheet.
        views: Views of each image.
        seed: Every draw follows from it.
        image_size: Side in pixels that images of a folder are brought to.
        flip: Whether a mirrored image keeps its label; `auto` asks the data set.
    """

    policy: str = "strong+cutmix"
    data: str = "digits"
    image_key: str | None = None
    label_key: str | None = None
    id_key: str | None = None
    out: str = "sheet.png"
    images: int = 6
    views: int = 5
    seed: int = 0
    image_size: int | None = None
    flip: Literal["auto", "yes", "no"] = "auto"


@dataclass
class BenchDataConfig:
    """Print images a second by stage (read, decode, augment, transfer, model), and the bottleneck.

    Attributes:
        data: As for training: `digits`, `folder:PATH`, `table:PATH` and so on.
        image_key: As for training.
        label_key: As for training.
        id_key: As for training.
        image_size: Side in pixels that encoded images are brought to.
        policy: Name of a policy, such as `strong+cutmix` or `randaugment(2, 9)`, or a YAML file.
        batch_size: Images of a batch.
        loader: Who decodes: `torch`, or `dali` (NVIDIA DALI, an extra).
        workers: Processes that decode ahead, or threads of DALI.
        model: The network.
        seconds: Of each stage.
        seed: Every draw follows from it.
        cpu: Use the CPU even where there is a GPU.
        threads: CPU threads of this process. `null` leaves PyTorch's choice.
    """

    data: str = "digits"
    image_key: str | None = None
    label_key: str | None = None
    id_key: str | None = None
    image_size: int = 224
    policy: str = "randaugment(2, 9)+cutmix"
    batch_size: int = 64
    loader: Literal["torch", "dali"] = "torch"
    workers: int = 2
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="resnet18"))
    seconds: float = 3.0
    seed: int = 0
    cpu: bool = False
    threads: int | None = None


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain data, the order of the fields kept."""
    return asdict(config)
