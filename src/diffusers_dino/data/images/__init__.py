"""Images: read from files, prepared, augmented and encoded."""
