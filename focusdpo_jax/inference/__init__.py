"""Sampling of images: the jitted generation loop, batches of prompts, and parsing of prompts."""
