"""What the training script is made of: objective, components, checkpoints, feature cache, validation."""

__all__ = []
