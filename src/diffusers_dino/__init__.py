"""Latent diffusion models of medical images, trained without annotations: a plugin for Hugging Face diffusers.

Importing this package registers it with diffusers' pipeline loader, so that a saved pipeline loads from the Hub.
"""

__version__ = "0.1.0"
