"""Networks as Flax Linen modules, and the generator built of them; images are NHWC."""
