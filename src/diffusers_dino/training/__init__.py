"""What training scripts are made of: objective, models, optimizers, checkpoints, cached features, validation."""

__all__ = []
