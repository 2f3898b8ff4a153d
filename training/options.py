"""All options of ARM's training: one dataclass that is the command line and the YAML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from arm_hf.modeling.configuration_arm import CHOICES, ARMConfig

CONFIGS = Path(__file__).parent / "configs"

NOT_PART_OF_THE_RUN = (
    "output_dir",
    "resume",
    "overwrite",
    "checkpoint_every",
    "log_every",
    "trackers",
    "workers",
    "cpu",
    "gradient_accumulation_steps",
    "cache_dir",
    "cache_limit_gb",
)
"""Options that a resumed run may change: the numbers it computes do not depend on them."""


def option(default: Any, help: str, **details: Any) -> Any:
    """A field with its help text; `details` go to argparse.

    Args:
        default: Its default.
        help: One line.
        details: Further arguments of argparse.
    """
    return field(default=default, metadata={"help": help, **details})


@dataclass
class TrainingOptions:
    """Options of a run. The defaults are the paper's (section 4.1) for ViT-B/16, and the literal reading elsewhere."""

    # What is trained
    clip: str = option(
        "openai/clip-vit-base-patch16", "frozen CLIP: hub id, folder, or an ARM checkpoint whose towers are taken"
    )
    clip_revision: str | None = option(None, "commit, tag or branch of a hub id")
    init_arm: str | None = option(None, "ARM checkpoint to start from in place of random weights")
    method: str = option("clearclip", "training-free method that supplies F_d and the coarse map while training")
    method_options: list[str] = field(
        default_factory=list, metadata={"help": "settings of the method", "metavar": "KEY=VALUE"}
    )
    fusion_layers: list[int] = field(
        default_factory=lambda: [3, 7],
        metadata={"help": "blocks whose outputs are concatenated, counted from 1 (Table 4)"},
    )
    num_cross_attention_layers: int = option(1, "cross-attention blocks (Eq. 2, Table 5)")
    num_self_attention_layers: int = option(1, "self-attention blocks (Eq. 3, Table 5)")
    num_attention_heads: int = option(8, "heads of both")
    ffn_ratio: float | None = option(4.0, "width of the blocks' feed-forward layer in multiples of D; none: without")
    dropout: float = option(0.0, "dropout in the blocks")
    mlp_layers: int = option(2, "linear layers in the MLP that makes F_m: 1 or 2")
    input_norm: bool = option(True, "LayerNorm before that MLP")
    deep_norm: bool = option(True, "LayerNorm on F_d before it is key and value")
    num_scale_blocks: int | None = option(None, "x2 upsampling blocks; none: by the patch size; 0: without (Table 6)")
    scale_block: str = option("eomt", "form of a scale block", choices=CHOICES["scale_block"])
    zero_init: bool = option(False, "start with M_r = 0")
    refinement_scale: float = option(1.0, "constant factor on M_r")
    coarse_form: str = option(
        "probabilities", "M_c as softmax(tau cos) (Eq. 1) or tau cos", choices=CHOICES["coarse_form"]
    )
    coarse_scale: float | None = option(None, "tau of M_c; none: CLIP's temperature")
    templates: str = option("imagenet80", "prompt templates of the class embeddings")

    # Loss
    loss: str = option("bce", "BCE on M_f (the paper), BCE on M_r, or cross-entropy on M_f", choices=CHOICES["loss"])
    loss_resolution: str = option(
        "labels", "M_f upsampled to the label crop, or labels brought to M_f", choices=CHOICES["loss_resolution"]
    )
    pixel_weighting: str = option(
        "even",
        "every pixel alike, or every label of an image by the root of its area",
        choices=CHOICES["pixel_weighting"],
    )
    ignored_pixels: str = option(
        "exclude", "leave ignored pixels out, or give them all-zero targets", choices=CHOICES["ignored_pixels"]
    )

    # Data
    data: list[str] = field(
        default_factory=list, metadata={"help": "training sets: folders, roots of standard trees, or hub ids"}
    )
    split: str = option("train", "split of the training sets")
    layout: str | None = option(None, "layout of the trees (see `arm-hf data`); none: recognised by their folders")
    image_column: str | None = option(None, "image column of hub data sets")
    label_column: str | None = option(None, "label column of hub data sets; another label folder of plain folders")
    class_names: list[str] = field(
        default_factory=list,
        metadata={"help": "label set or text file with the words of each training set, in order; own: the set's names"},
    )
    val_data: list[str] = field(
        default_factory=list, metadata={"help": "validation sets; best is chosen by their mean mIoU"}
    )
    val_split: str = option("val", "split of the validation sets")
    val_class_names: list[str] = field(
        default_factory=list, metadata={"help": "as class_names, for the validation sets"}
    )
    val_images: int | None = option(None, "validate on that many images per set, evenly spread; none: all")
    val_every: int = option(0, "steps between validations; 0: once an epoch")
    val_threshold: float | None = option(0.3, "score below which a pixel is background, in sets with that class")
    shortest_edge: int = option(336, "shorter side of an image in validation, and in the saved image processor")

    # Views
    crop_size: int = option(336, "side of the square training crops in pixels")
    resize_min: int = option(336, "least shorter side an image is resized to before it is cropped")
    resize_max: int = option(448, "greatest one; drawn evenly between them")
    flip: float = option(0.5, "probability of mirroring")

    # Optimisation
    epochs: int = option(5, "passes over the training sets")
    max_steps: int | None = option(None, "optimiser steps, in place of epochs")
    batch_size: int = option(4, "images of an optimiser step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = option(1, "parts that a process works off one after another in a step")
    learning_rate: float = option(1e-4, "AdamW's")
    weight_decay: float = option(1e-3, "AdamW's, on all weights")
    schedule: str = option(
        "cosine", "course of the learning rate", choices=("cosine", "constant", "constant_with_warmup", "linear")
    )
    warmup_steps: int = option(0, "steps of linear increase before it")
    max_grad_norm: float | None = option(1.0, "clip the gradient to this norm; none: do not")
    mixed_precision: str | None = option(
        None, "autocast; none: what `accelerate launch` says, else no", choices=("no", "fp16", "bf16")
    )
    autocast_arm: bool = option(False, "autocast ARM too, not CLIP alone")
    seed: int = option(0, "of weights, order and crops")
    view_seed: int | None = option(None, "of the crops alone, so that runs of several seeds share a cache; none: seed")

    # Cached features
    cache_features: bool = option(False, "run CLIP once on every view, keep its features on disk, and train on these")
    cache_dir: str = option("runs/feature_cache", "folder of the caches; runs with the same views share one")
    cache_views: int = option(1, "views of an image in the cache; epoch e trains on view e modulo this")
    cache_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "further blocks to cache, so that runs with other fusion_layers share a cache"},
    )
    cache_dtype: str = option("float16", "stored type", choices=("float16", "float32"))
    cache_limit_gb: float = option(100.0, "greatest size of the cache folder in GB")

    # LoRA
    lora: bool = option(False, "train LoRA on attention projections of CLIP's image tower beside ARM (needs peft)")
    lora_rank: int = option(8, "rank")
    lora_alpha: int = option(16, "scaling, in multiples of 1/rank")
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "projections", "choices": ("q_proj", "k_proj", "v_proj", "out_proj")},
    )
    lora_blocks: list[int] = field(default_factory=list, metadata={"help": "blocks, counted from 1; none named: all"})

    # The run
    output_dir: str = option("runs/arm", "folder of checkpoints and logs")
    resume: bool = option(False, "go on from the last checkpoint in output_dir, if there is one")
    overwrite: bool = option(False, "replace a finished or broken-off run in output_dir")
    checkpoint_every: int = option(500, "steps between checkpoints")
    log_every: int = option(10, "steps between lines in log.jsonl")
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "tensorboard, trackio, wandb, ... (see accelerate)"}
    )
    workers: int = option(4, "processes that read images, per training process")
    cpu: bool = option(False, "do not use an accelerator")

    def __post_init__(self) -> None:
        positive = ["crop_size", "resize_min", "epochs", "batch_size", "gradient_accumulation_steps", "learning_rate"]
        positive += ["cache_views", "cache_limit_gb", "lora_rank", "checkpoint_every", "log_every", "shortest_edge"]
        wrong = [name for name in positive if getattr(self, name) <= 0]
        wrong += [name for name in ("max_steps", "val_images") if (getattr(self, name) or 1) <= 0]
        if wrong:
            raise ValueError(f"{wrong[0]} must be positive, got {getattr(self, wrong[0])}")
        for name in ("val_every", "warmup_steps", "weight_decay", "workers", "seed", "view_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability from 0 to 1, got {self.flip}")
        if not self.crop_size <= self.resize_min <= self.resize_max:
            raise ValueError(
                f"crop_size <= resize_min <= resize_max is needed, so that a crop holds image alone; got "
                f"{self.crop_size}, {self.resize_min}, {self.resize_max}"
            )
        for names, sets in (("class_names", "data"), ("val_class_names", "val_data")):
            counts = len(getattr(self, names)), len(getattr(self, sets))
            if all(counts) and counts[0] != counts[1]:
                raise ValueError(
                    f"{names} must name one label set per entry of {sets} ({counts[1]}), got {counts[0]}; write own "
                    "where a set's own names are right"
                )
        if self.lora and self.cache_features:
            raise ValueError("lora changes CLIP's features at every step, so they cannot be cached; leave one out")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run, overwrite replaces it; give one of them")

    def arm_fields(self) -> dict[str, Any]:
        """The options that are fields of `ARMConfig`."""
        names = [name for name in vars(self) if name in ARMConfig.__dataclass_fields__ and name != "clip_revision"]
        fields = {name: getattr(self, name) for name in names}
        fields["method_options"] = dict(_key_value(entry) for entry in self.method_options)
        return fields

    def of_the_run(self) -> dict[str, Any]:
        """The options that decide which numbers a run computes."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_PART_OF_THE_RUN}


class _Parser(HfArgumentParser):
    """Raises ValueError where argparse prints its usage, 70 flags long, and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse_options(arguments: Sequence[str] | None = None) -> TrainingOptions:
    """Read the command line; flags go before the values of `--config`, these before the defaults.

    Args:
        arguments: Flags; by default those of the process.

    Raises:
        ValueError: An unknown option or a value of the wrong type, in the flags or the file.
    """
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen, flags = _config_parser().parse_known_args(given)
    from_file: list[str] = []
    if chosen.config is not None:
        path = find_config(chosen.config)
        from_file = _as_flags(path)
        try:
            parser.parse_args(from_file)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
    values = vars(parser.parse_args([*from_file, *flags]))
    values.pop("config")
    return TrainingOptions(**values)


def find_config(name: str) -> Path:
    """The YAML file of that path, or of that name among the recipes that come with the package.

    Raises:
        ValueError: There is none.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise ValueError(f"there is no config {name!r}; give a YAML file or one of {known}")


def save_options(options: TrainingOptions, path: Path) -> None:
    """Write a file that `--config` reads.

    Args:
        options: Of the run.
        path: Where to.
    """
    path.write_text(yaml.safe_dump(dataclasses.asdict(options), sort_keys=False), encoding="utf-8")


def _config_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _parser() -> _Parser:
    parser = _Parser(
        TrainingOptions,
        prog="train.py",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description="Train the Attention Refinement Module on a frozen CLIP.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of the options below; flags go before it")
    hints = get_type_hints(TrainingOptions)
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # an empty list is a value too
        elif type(None) in get_args(hints.get(action.dest)) and action.type is not None:
            action.type = _or_none(action.type)
            action.choices = None if action.choices is None else (*action.choices, None)
    return parser


def _or_none(convert: Any) -> Any:
    def read(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    read.__name__ = getattr(convert, "__name__", "value")
    return read


def _as_flags(path: Path) -> list[str]:
    """A YAML file as flags, so that one parser checks and converts both."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold a mapping of options to values")
    known = {f.name for f in dataclasses.fields(TrainingOptions)}
    unknown = [str(key) for key in content if str(key).replace("-", "_") not in known]
    if unknown:
        raise ValueError(f"{str(path)!r} has unknown options: {', '.join(unknown)} (see --help)")
    flags: list[str] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            value = [f"{name}={entry}" for name, entry in value.items()]
        elif value is False and str(key).replace("-", "_") == "mixed_precision":
            value = "no"  # YAML reads a bare no as false
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *("none" if entry is None else str(entry) for entry in values)]
    return flags


def _key_value(entry: str) -> tuple[str, Any]:
    key, equals, value = entry.partition("=")
    if not equals:
        raise ValueError(f"method_options are written KEY=VALUE, got {entry!r}")
    return key, yaml.safe_load(value)
