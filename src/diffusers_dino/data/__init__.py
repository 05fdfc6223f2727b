"""Images in: reading, preparation, augmentation and the order in which training sees them."""

from .datasets import ImageDataset, collate, open_images
from .images.augmentation import Augmentation
from .images.dicom_header import dicom_facts, salted_hash
from .images.preprocessing import Preprocessing
from .images.reading import RawLayout, UnreadableImageError, read_image
from .loader import load_batches
from .order import GlobalBatchSampler, Slot
from .sharding import verify_shards
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
