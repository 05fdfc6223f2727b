"""Are the tokens that a prior draws like those of real images, and not those of its training images?"""
