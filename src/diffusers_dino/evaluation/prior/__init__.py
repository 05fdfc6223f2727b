"""Are the tokens that a prior draws like those of real images, and not those of its training images?"""

from .protocol import PriorResult, TokenFigures, evaluate_prior

__all__ = ["PriorResult", "TokenFigures", "evaluate_prior"]
