"""A result of an evaluation, for tests of what is made of results."""

from diffusers_dino.evaluation import ReconstructionResult, RetrievalFigures

RETRIEVAL = RetrievalFigures(0.5, 0.0156, 0.02, 0.4)
RECONSTRUCTION = ReconstructionResult(64, 512, (0, 1), 20, 2.0, RETRIEVAL, RETRIEVAL, 1.0, 9.0, 0.5)
