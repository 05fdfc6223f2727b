"""Where the images, labels, patients, views and splits of a provider's data set are."""

from .record import Record

__all__ = ["Record"]
