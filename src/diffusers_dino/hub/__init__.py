"""Trained models and synthetic sets on the Hugging Face Hub: cards, and uploads of nothing but the model.

`write_model_card` describes a trained model from its `TrainingRecord`, from the configs in its folder and from results
(`diffusers_dino.hub.measurements.read_results`); `push_folder` uploads it. `write_dataset_card` describes a synthetic
set. What names a folder of this machine or a DICOM UID is refused.
"""

from .cards import Measurement, dataset_card, folder_card, model_card, write_dataset_card, write_model_card
from .folder import half_precision_files, model_files
from .record import TrainingRecord
from .samples import draw_samples
from .upload import files_to_push, push_files, push_folder, write_files

__all__ = [
    "Measurement",
    "TrainingRecord",
    "dataset_card",
    "draw_samples",
    "files_to_push",
    "folder_card",
    "half_precision_files",
    "model_card",
    "model_files",
    "push_files",
    "push_folder",
    "write_dataset_card",
    "write_files",
    "write_model_card",
]
