"""Are generated images copies of training images?"""
