"""Results as figures, a module for each kind of result. Nothing is computed here beyond what a line needs."""

__all__: list[str] = []
