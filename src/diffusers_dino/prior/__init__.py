"""Condition tokens from labels, metadata, text or nothing: what a prior is asked for, and the model."""

from .conditions import Condition, PriorConditions
from .identity import describe_conditioner, require_conditioner
from .model import DinoPrior

__all__ = ["Condition", "DinoPrior", "PriorConditions", "describe_conditioner", "require_conditioner"]
