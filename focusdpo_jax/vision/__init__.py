"""Frozen vision encoders that measure images, their preprocessing, and where a subject is in an image."""
