"""What segmentations are measured by."""

from .mean_iou.confusion_matrix import ConfusionMatrix

__all__ = ["ConfusionMatrix"]
