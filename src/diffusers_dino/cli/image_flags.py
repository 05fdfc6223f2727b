"""Which images a script trains on: the flags that all of them share, and how they are opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import data
from .arguments import flag


@dataclass
class ImageArguments:
    train_data_dir: str | None = flag(
        None, "Folder or URL of images, tars, or `datasets` folder.", aliases=["--train_data"], group="Data"
    )
    dataset_name: str | None = flag(None, "Data set of the Hugging Face Hub, in place of a local one.")
    dataset_config_name: str | None = flag(None, "Its configuration.")
    dataset_split: str = flag("train", "Split of a `datasets` set, or of a folder of shards with a manifest.")
    image_column: str = flag("image", "Column of images of a `datasets` set.")
    keys_file: str | None = flag(None, "Text file of sample keys, one a line: train on these alone.")
    max_train_samples: int | None = flag(None, "Train on the first samples alone.")
    in_memory: bool = flag(False, "Prepare all images once and keep them in memory: for small sets.")
    max_unreadable: float = flag(0.05, "Largest tolerated fraction of images that cannot be read.")
    shuffle_window_shards: int = flag(
        0, "Shuffle within windows of this many shards: for remote or huge sets; 0 is full."
    )
    dataloader_num_workers: int = flag(0, "Processes that load data; 0 loads in the main process.")
    resolution: int = flag(256, "Side of the images in pixels.")
    remove_borders: bool = flag(True, "Cut uniform borders off.")


def open_training_images(args: ImageArguments) -> data.ImageDataset:
    """Open what the flags name; ValueError unless it is one local source or one data set of the Hub."""
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("Give the images as --train_data_dir or as --dataset_name.")
    images = data.open_images(
        args.train_data_dir or args.dataset_name,
        data.Preprocessing(args.resolution, args.remove_borders),
        split=args.dataset_split,
        image_column=args.image_column,
        config_name=args.dataset_config_name,
        local_files_only=args.dataset_name is None,
        in_memory=args.in_memory,
        max_unreadable=args.max_unreadable,
    )
    if args.keys_file:
        images = images.select(Path(args.keys_file).read_text().splitlines())
    return images.select(images.keys[: args.max_train_samples]) if args.max_train_samples else images
