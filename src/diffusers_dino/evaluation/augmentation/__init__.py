"""Do synthetic images help a classifier?"""
