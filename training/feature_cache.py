"""CLIP's features of every training view, computed once and kept on disk.

CLIP is frozen, so what ARM reads (hidden states of two blocks, F_d) is a function of the view alone. A cache is a
folder named after a fingerprint of everything that the features depend on, with

    records.bin   one record per view: hidden states, F_d, labels, in fixed size
    written.bin   one byte per record, 1 once the record is on disk
    about.json    shapes, and what the fingerprint was made of

so that a broken-off build goes on where it stopped, and several processes write at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from arm_hf.folders import atomic_path
from arm_hf.modeling.method import Method, get_method
from arm_hf.modeling.modeling_arm import ARMModel

from .options import TrainingOptions
from .views import Key, TrainingSet, Views, collate

FORMAT = 1
GB = 10**9
SYNC_EVERY = 64  # records between two waits for the disk


@dataclass(frozen=True)
class RecordLayout:
    """Shapes and types of a record.

    Attributes:
        hidden: (layers, L, W).
        deep: (h, w, D).
        labels: (S, S).
        dtype: Of the features.
        label_dtype: Of the labels.
    """

    hidden: tuple[int, ...]
    deep: tuple[int, ...]
    labels: tuple[int, ...]
    dtype: str
    label_dtype: str

    @property
    def fields(self) -> np.dtype:
        """The record as a structured type."""
        return np.dtype(
            [
                ("hidden", self.dtype, self.hidden),
                ("deep", self.dtype, self.deep),
                ("labels", self.label_dtype, self.labels),
            ]
        )


class FeatureCache(Dataset):
    """Records on disk, read through a memory map. Entries have the form of those of `Views`, with features for pixels.

    Args:
        folder: Of this cache; made if missing.
        layout: Of a record.
        sizes: Images per training set.
        names: Name of every image, by set.
        views: Views per image.
        chosen: Which of the stored hidden states an entry has.
    """

    def __init__(
        self,
        folder: Path,
        layout: RecordLayout,
        sizes: Sequence[int],
        names: list[list[str]],
        views: int,
        chosen: Sequence[int],
    ):
        self.folder, self.layout, self.views, self.names, self.chosen = folder, layout, views, names, list(chosen)
        self.offsets = np.cumsum([0, *sizes])
        self._records: np.memmap | None = None

    def __len__(self) -> int:
        return int(self.offsets[-1]) * self.views

    def __getitem__(self, key: Key) -> dict[str, Any]:
        if self._records is None:  # opened where it is read: a worker process maps the file itself
            self._records = np.memmap(self.folder / "records.bin", self.layout.fields, "r", shape=(len(self),))
        record = self._records[self.position(key)]
        return {
            "name": self.names[key[0]][key[1]],
            "set": key[0],
            "hidden": torch.from_numpy(record["hidden"][self.chosen]),
            "deep": torch.from_numpy(record["deep"].copy()),
            "labels": torch.from_numpy(record["labels"].astype(np.int32)),
        }

    def position(self, key: Key) -> int:
        """Number of the record that holds a view."""
        number, image, epoch = key
        return epoch % self.views * int(self.offsets[-1]) + int(self.offsets[number]) + image

    def keys(self) -> list[Key]:
        """All views, in the order of the records."""
        sizes = np.diff(self.offsets).tolist()
        return [(s, image, view) for view in range(self.views) for s, size in enumerate(sizes) for image in range(size)]

    def missing(self) -> list[Key]:
        """Views that have no record yet."""
        path = self.folder / "written.bin"
        written = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
        written = np.pad(written, (0, len(self) - len(written)))
        return [key for key, done in zip(self.keys(), written, strict=True) if not done]


class _Writer:
    """Puts records where they belong; ordinary writes, since a full disk under a memory map kills the process."""

    def __init__(self, cache: FeatureCache):
        self.cache = cache
        self.records = os.open(cache.folder / "records.bin", os.O_WRONLY | os.O_CREAT, 0o644)
        self.flags = os.open(cache.folder / "written.bin", os.O_WRONLY | os.O_CREAT, 0o644)
        self.pending: list[int] = []

    def write(self, key: Key, hidden: Tensor, deep: Tensor, labels: Tensor) -> None:
        record = np.zeros((), self.cache.layout.fields)
        for name, value in (("hidden", hidden), ("deep", deep), ("labels", labels)):
            record[name] = value.cpu().numpy()
        position = self.cache.position(key)
        content, offset = memoryview(record.tobytes()), position * record.nbytes
        while content:  # a nearly full disk takes a part, and refuses the next
            count = os.pwrite(self.records, content, offset)
            content, offset = content[count:], offset + count
        self.pending.append(position)
        if len(self.pending) >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        os.fsync(self.records)
        for position in self.pending:
            os.pwrite(self.flags, b"\x01", position)
        self.pending.clear()

    def close(self) -> None:
        os.close(self.records)
        os.close(self.flags)


def check_cacheable(method: Method, settings: Any) -> None:
    """Raise ValueError when features cannot stand for the method: they depend on the words, or scores are its own.

    Args:
        method: The host.
        settings: Its settings.
    """
    if method.needs_words(settings) or type(method).score_map is not Method.score_map:
        raise ValueError(
            f"the features of {method.name!r} cannot be cached: its maps need more than them; train with a method such "
            "as clearclip, or without cache_features"
        )


def fingerprint(model: ARMModel, views: Views, options: TrainingOptions, precision: str) -> dict[str, Any]:
    """Everything that the features and labels of the views depend on; `precision` is autocast's.

    Args:
        model: Its towers and method.
        views: Crops and files.
        options: Of the run.
        precision: Autocast's.
    """
    config: Any = model.config
    towers = hashlib.blake2b(digest_size=16)
    for part in (model.clip.vision_model, model.clip.visual_projection):
        for name, weight in sorted(part.state_dict().items()):
            towers.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    names = ("crop_size", "resize_min", "resize_max", "flip", "cache_views", "cache_dtype")
    return {
        "format": FORMAT,
        "clip": towers.hexdigest(),
        "precision": precision,
        "method": config.method,
        "method_options": config.method_options,
        "layers": stored_layers(model, options),
        "normalisation": [views.mean.tolist(), views.std.tolist()],
        "views": {"seed": views.seed, **{name: getattr(options, name) for name in names}},
        "sets": [_digest_of_set(chosen) for chosen in views.sets],
        "ignore_index": config.ignore_index,
    }


def stored_layers(model: ARMModel, options: TrainingOptions) -> list[int]:
    """Blocks whose outputs are cached, in ascending order, each once.

    Args:
        model: Its ARM reads some of them.
        options: Their `cache_layers` are the others.
    """
    config: Any = model.config
    return sorted({*config.fusion_layers, *options.cache_layers})


def _digest_of_set(chosen: TrainingSet) -> dict[str, Any]:
    """Names and labels by content; files by name, size and time of change."""
    digest = hashlib.blake2b(chosen.lookup.tobytes(), digest_size=16)
    if chosen.data.lookup is not None:
        digest.update(chosen.data.lookup.tobytes())
    for row in chosen.data.dataset:
        digest.update(row["name"].encode())
        for cell in (row["image"], row["labels"]):
            if cell["bytes"] is not None:
                digest.update(cell["bytes"])
            else:
                state = os.stat(cell["path"])
                digest.update(f"{os.path.basename(cell['path'])} {state.st_size} {state.st_mtime_ns}".encode())
    return {"name": chosen.data.name, "split": chosen.data.split, "images": len(chosen.data), "is": digest.hexdigest()}


def open_cache(
    model: ARMModel, views: Views, options: TrainingOptions, accelerator: Accelerator, batch_size: int = 8
) -> FeatureCache:
    """The cache of a run's views; what it lacks is computed first, by all processes together.

    Args:
        model: On its device; its CLIP is run where views are missing.
        views: The views.
        options: Where the cache is, what it may grow to, how many views an image has.
        accelerator: Of the run.
        batch_size: Views of a forward pass.

    Raises:
        ValueError: The cache would outgrow `cache_limit_gb` or the disk, or the method's features cannot be cached.
        OSError: The disk is full after all.
    """
    config: Any = model.config
    method = get_method(config.method)
    check_cacheable(method, method.settings(config.method_options))
    about = fingerprint(model, views, options, accelerator.mixed_precision)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(options.cache_dir).expanduser() / f"features-{name}"
    sizes = [len(chosen.data) for chosen in views.sets]
    names = [[f"{s.data.name}/{row}" for row in s.data.dataset["name"]] for s in views.sets]
    layers = stored_layers(model, options)
    chosen = [layers.index(layer) for layer in config.fusion_layers]
    cache = FeatureCache(folder, _layout(folder, model, options), sizes, names, options.cache_views, chosen)
    missing = cache.missing()
    if not missing:
        accelerator.print(f"features of {len(cache)} views are in {folder}")
        return cache
    _make_room(cache, len(missing), options.cache_limit_gb)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "about.json") as path:
            path.write_text(json.dumps({**about, "layout": asdict(cache.layout)}, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    try:
        _compute(model, views, cache, mine, options, accelerator, batch_size)
    except OSError as error:
        raise OSError(
            f"cannot write the feature cache {str(folder)!r}: {error.strerror or error}; what is written is kept and "
            "used when the run is started again"
        ) from error
    accelerator.wait_for_everyone()
    return cache


def _layout(folder: Path, model: ARMModel, options: TrainingOptions) -> RecordLayout:
    """Shapes of a record: those of the cache that is there, or found out with one blank view."""
    about = folder / "about.json"
    if about.exists():
        known = json.loads(about.read_text(encoding="utf-8"))["layout"]
        hidden, deep, labels = (tuple(known[name]) for name in ("hidden", "deep", "labels"))
        return RecordLayout(hidden, deep, labels, known["dtype"], known["label_dtype"])
    size = options.crop_size
    config: Any = model.config
    states, features = _features(
        model, torch.zeros(1, 3, size, size, device=model.device), stored_layers(model, options)
    )
    return RecordLayout(
        tuple(states.shape[1:]),
        tuple(features.shape[1:]),
        (size, size),
        options.cache_dtype,
        "uint8" if config.ignore_index == 255 else "uint16",
    )


def _make_room(cache: FeatureCache, missing: int, limit_gb: float) -> None:
    """Raise ValueError when the cache folder would grow beyond its limit, or beyond the disk."""
    root = cache.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    record = cache.layout.fields.itemsize
    others = sum(path.stat().st_size for path in root.glob("*/records.bin") if path.parent != cache.folder)
    total, free = record * len(cache), shutil.disk_usage(root).free
    if total + others > limit_gb * GB:
        kept = f" beside {others / GB:.3g} GB of other runs in {str(root)!r}" if others else ""
        raise ValueError(
            f"the features of {len(cache)} views need {total / GB:.3g} GB{kept}, but cache_limit_gb is {limit_gb:g}; "
            "raise it, remove other caches, use fewer cache_views or images, or train without cache_features"
        )
    if record * missing > free:
        raise ValueError(
            f"the features need {record * missing / GB:.3g} GB, but {str(root)!r} has {free / GB:.3g} GB free; choose "
            "another cache_dir, or train without cache_features"
        )


@torch.no_grad()
def _features(model: ARMModel, pixels: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Outputs of the blocks, (B, layers, L, W), and F_d, (B, h, w, D)."""
    config: Any = model.config
    features = model.dense.features(pixels, config.method, config.method_options, hidden_states=layers)
    return torch.stack([features.trunk.hidden_states[layer] for layer in layers], dim=1), features.patch_features


@torch.no_grad()
def _compute(
    model: ARMModel,
    views: Views,
    cache: FeatureCache,
    keys: list[Key],
    options: TrainingOptions,
    accelerator: Accelerator,
    batch_size: int,
) -> None:
    layers = stored_layers(model, options)
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader: Any = DataLoader(views, batch_sampler=batches, num_workers=options.workers, collate_fn=collate)
    writer = _Writer(cache)
    dtype = getattr(torch, cache.layout.dtype)
    bar = tqdm(total=len(keys), desc="features", unit="view", disable=not accelerator.is_main_process, mininterval=2)
    try:
        for members, batch in zip(batches, loader, strict=True):
            if "error" in batch:
                raise ValueError(batch["error"])
            with accelerator.autocast():
                hidden, deep = _features(model, batch["pixels"].to(accelerator.device), layers)
            hidden, deep = hidden.to(dtype), deep.to(dtype)
            for index, key in enumerate(members):
                if not bool(hidden[index].isfinite().all() and deep[index].isfinite().all()):
                    raise ValueError(
                        f"the features of {batch['names'][index]} do not fit into {cache.layout.dtype}; use "
                        "cache_dtype float32"
                    )
                writer.write(key, hidden[index], deep[index], batch["labels"][index])
            bar.update(len(members))
        writer.sync()
    finally:
        writer.close()
        bar.close()
