"""Frozen vision encoders, their preprocessing, and the regions of subjects in images."""
