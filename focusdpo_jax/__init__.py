"""FocusDPO in JAX: preference post-training of personalised image generators."""

__version__ = "0.1.0"
