"""Do synthetic images show what their labels say?"""
