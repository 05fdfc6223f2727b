"""Do the images on a path leave one image and approach the other?"""
