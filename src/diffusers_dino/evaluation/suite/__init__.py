"""All questions of a set of synthetic images, asked at once."""
