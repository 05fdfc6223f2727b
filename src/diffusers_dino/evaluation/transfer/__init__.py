"""Do classifiers of real images tell the labels of synthetic ones, and the reverse?"""
