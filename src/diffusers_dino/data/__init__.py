"""Images: reading and preparing them, where they are kept, and the order in which training sees them."""

from .datasets import ImageDataset, collate, open_images
from .images.augmentation import Augmentation
from .images.dicom import read_dicom
from .images.dicom_header import dicom_facts, salted_hash
from .images.errors import NoImageError, UnreadableImageError
from .images.preprocessing import Preprocessing
from .images.reading import RawLayout, read_image
from .labels import LabelTable, SoftLabelTable, read_label_table, read_soft_labels, stored_labels
from .loader import TrainingViews, load_batches
from .order import GlobalBatchSampler, Slot, WindowedOrder
from .sharding import verify_shards
from .splits import SplitRule
from .stores import ImageStore
from .stores.archives import write_index

__all__ = [
    "Augmentation",
    "GlobalBatchSampler",
    "ImageDataset",
    "ImageStore",
    "LabelTable",
    "NoImageError",
    "Preprocessing",
    "RawLayout",
    "Slot",
    "SoftLabelTable",
    "SplitRule",
    "TrainingViews",
    "UnreadableImageError",
    "WindowedOrder",
    "collate",
    "dicom_facts",
    "load_batches",
    "open_images",
    "read_dicom",
    "read_image",
    "read_label_table",
    "read_soft_labels",
    "salted_hash",
    "stored_labels",
    "verify_shards",
    "write_index",
]
