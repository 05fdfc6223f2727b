"""How far are generated images from real ones?"""
