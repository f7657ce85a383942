"""What training carries from step to step, and the optimiser that changes it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


@flax.struct.dataclass
class TrainState:
    """The state of a run. The frozen parameters are not part of it.

    Attributes:
      step: int32 scalar, batches seen (with gradient accumulation several make an update).
      trainable: parameters under training, float32.
      optimizer: optax's state.
      average: exponential moving average of `trainable`, or None where the run keeps none.
    """

    step: jax.Array
    trainable: dict
    optimizer: optax.OptState
    average: dict | None

    @property
    def evaluated(self):
        """The parameters to look at and to keep: the average where there is one."""
        return self.trainable if self.average is None else self.average


def learning_rate_schedule(config):
    """Linear warm-up to `config.learning_rate`, then constant or a cosine decay to zero.

    A run that is shorter than its warm-up ends in it.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(config.steps, warmup + 1))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.constant_schedule(peak)], [warmup])


def make_optimizer(config):
    """AdamW after clipping by global norm; one update every `config.accumulate` batches."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(learning_rate_schedule(config), b1=0.9, b2=config.adam_b2,
                    weight_decay=config.weight_decay),
    )
    if config.accumulate > 1:
        # MultiSteps keeps a sum as large as the gradient, so it is used only where it is needed.
        optimizer = optax.MultiSteps(optimizer, config.accumulate)
    return optimizer


def create_state(trainable, optimizer, ema_decay):
    """A fresh state; a positive `ema_decay` starts an average at the parameters themselves."""
    average = jax.tree.map(jnp.copy, trainable) if ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)
    # Counters are born on the first device; what a checkpoint restores lies where its example does.
    sharding = getattr(jax.tree.leaves(trainable)[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if not x.ndim else x, state)
