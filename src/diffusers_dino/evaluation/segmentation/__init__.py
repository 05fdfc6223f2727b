"""Do segments of the model's attention find anatomy?"""
