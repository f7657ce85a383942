"""Draws images with a generator: the jitted sampler, batches of prompts, and how prompts are read."""
