"""Can it be told of which patient a generated image is?"""
