"""Diffusion without a model: noise schedule, prediction types, samplers, guidance."""
