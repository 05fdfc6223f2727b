"""Commands that measure a model or a synthetic set."""
