"""Shards: data sets prepared once, without ids, and written as webdataset tars with a manifest."""

from .make import make_shards
from .manifest import ShardError, check_shards, read_manifest, verify_shards
from .plan import PlanRule
from .provenance import recorded_sources, require_synthetic

__all__ = [
    "PlanRule",
    "ShardError",
    "check_shards",
    "make_shards",
    "read_manifest",
    "recorded_sources",
    "require_synthetic",
    "verify_shards",
]
