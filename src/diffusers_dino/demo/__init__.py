"""A page in the browser: variations of an image, blends of two, segments; see `launch`."""

from .server import launch, read_logins

__all__ = ["launch", "read_logins"]
