"""Can it be told which images a model was trained on?"""
