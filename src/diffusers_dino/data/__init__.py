"""Images in: reading, preparation, augmentation and the order in which training sees them."""

from .augmentation import Augmentation
from .datasets import ImageDataset, collate, open_images
from .dicom_header import dicom_facts, salted_hash
from .loading import load_batches
from .preprocessing import Preprocessing
from .reading import RawLayout, UnreadableImageError, read_image
from .sampling import GlobalBatchSampler, Slot
from .shards import verify_shards
from .views import TrainingViews

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
    "dicom_facts",
    "load_batches",
    "open_images",
    "read_image",
    "salted_hash",
    "verify_shards",
]
