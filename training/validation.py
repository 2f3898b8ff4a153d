"""mIoU of the model in training, on whole images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from arm_hf.data import SegmentationData
from arm_hf.metrics import ConfusionMatrix
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.prompts import Vocabulary
from arm_hf.modeling.text import TextEncoder

from .options import TrainingOptions
from .running import let_parent_decide
from .views import name_classes, open_sets


class _Images(Dataset):
    """Whole images for the model, pixels (1, 3, H, W), with labels (H', W') at the size of the file; or an error."""

    def __init__(self, data: SegmentationData, processor: Any):
        self.data, self.processor = data, processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray] | str:
        try:
            image, labels = self.data.read(self.data.dataset[index])
        except (ValueError, OSError) as error:
            return f"cannot validate on {self.data.name}: {error}"
        return self.processor(image, return_tensors="pt").pixel_values, labels


class Validator:
    """Measures a model on the validation sets of a run.

    Args:
        options: Which sets, how many images, the background threshold.
        encoder: Of the words.
        processor: Image processor.
        accelerator: Images are spread over its processes.

    Raises:
        ValueError: A set is missing, malformed or empty, or its class names are of another number.
    """

    def __init__(self, options: TrainingOptions, encoder: TextEncoder, processor: Any, accelerator: Accelerator):
        self.options, self.processor, self.accelerator = options, processor, accelerator
        self.sets = []
        names = options.val_class_names or ["own"] * len(options.val_data)
        for data, given in zip(open_sets(options, options.val_data, options.val_split), names, strict=True):
            if options.val_images is not None and options.val_images < len(data):
                data = data.select(np.linspace(0, len(data) - 1, options.val_images).round().astype(int).tolist())
            vocabulary = Vocabulary.build(name_classes(data, given))
            words = encoder.class_embeddings(vocabulary.queries, options.templates)
            self.sets.append((data, vocabulary, words))

    def measure(self, model: ARMModel) -> dict[str, float]:
        """mIoU over the classes that occur, per set and on average (`mean`); every process must call this."""
        results = {}
        for data, vocabulary, words in self.sets:
            confusion = ConfusionMatrix(len(data.classes), data.ignore_index)
            threshold = None if data.background_index is None else self.options.val_threshold
            for pixels, labels in self._images(data):
                with self.accelerator.autocast():
                    decisions = model.segment(
                        pixels.to(self.accelerator.device),
                        words,
                        class_of_query=vocabulary.class_of_query,
                        num_classes=vocabulary.num_classes,
                        sizes=[labels.shape],
                        background_index=data.background_index,
                        threshold=threshold,
                    )
                confusion.update(decisions[0].labels.cpu().numpy(), labels)
            results[data.name] = float(confusion.reduce().compute()["mean_iou"])
        return {**results, "mean": float(np.mean(list(results.values())))}

    def _images(self, data: SegmentationData) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        mine = data.shard(self.accelerator.num_processes, self.accelerator.process_index)
        loader: Any = DataLoader(
            _Images(mine, self.processor),
            batch_size=None,
            num_workers=self.options.workers,
            collate_fn=_as_it_is,
            worker_init_fn=let_parent_decide,
            generator=torch.Generator(),  # the default one belongs to training
        )
        quiet = not self.accelerator.is_main_process
        for entry in tqdm(loader, desc=f"mIoU {data.name}", unit="image", leave=False, disable=quiet, mininterval=2):
            if isinstance(entry, str):
                raise ValueError(entry)
            yield entry


def _as_it_is(entry: Any) -> Any:
    return entry
