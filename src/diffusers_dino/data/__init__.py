"""Images in: reading, preparation, augmentation and the order in which training sees them."""

from .augmentation import Augmentation
from .datasets import ImageDataset, TrainingViews, collate, load_batches, open_images
from .preprocessing import Preprocessing
from .reading import RawLayout, UnreadableImageError, read_image
from .sampling import GlobalBatchSampler, Slot

__all__ = [
    "Augmentation",
    "GlobalBatchSampler",
    "ImageDataset",
    "Preprocessing",
    "RawLayout",
    "Slot",
    "TrainingViews",
    "UnreadableImageError",
    "collate",
    "load_batches",
    "open_images",
    "read_image",
]
