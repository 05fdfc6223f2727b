"""Does the model follow its condition?"""
