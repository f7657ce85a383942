"""Timestep buckets: a training step uses one range of timesteps, with its own settings.

A bucket has two parts. Its *structure* defines which terms of the weight exist; it is static and
selects the compiled program. Its *parameters* (timestep range, rho, lambdas, tau) are dynamic
arguments. Buckets of equal structure share one executable, and disabled terms are never traced.

    buckets = make_buckets(count=4)                                  # 4 buckets, 2 structures
    bucket = buckets[bucket_for_step(seed, step, len(buckets))]      # the same on every host
    state = jax.jit(train_step)(state, batch, bucket)                # compiled once per structure

The dependence of the focus on the timestep, and the use of detail only at low noise, are [known]
(FocusDPO, arXiv 2509.01181, pipeline figure). Buckets, their schedules and their order are [ours].
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from focusdpo_jax.array_types import IntScalar, Scalar
from focusdpo_jax.errors import UserError

# Separates the order of buckets from other random numbers of the same seed.
_ROLE = int.from_bytes(b"buckets", "big")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BucketStructure:
    """The terms of a bucket's weight. Hashable, and a static argument of `jax.jit`.

    Attributes:
      spaf: whether patches that match no reference get more weight.
      dpce: whether patches with detail get more weight.
      confidence: whether patches with low confidence of the reference model get more weight.
    """

    spaf: bool
    dpce: bool
    confidence: bool = False

    def __str__(self) -> str:
        terms = [name for name in ("spaf", "dpce", "confidence") if getattr(self, name)]
        return "+".join(terms) or "prior"


class BucketParams(NamedTuple):
    """The dynamic settings of a bucket, a pytree of scalars.

    Attributes:
      index: position among the run's buckets; index into values that are cached per bucket.
      t_low, t_high: range of timesteps, t_low <= t < t_high.
      rho: share of a subject's area that SPAF may match, >= 0.
      lambda_s: extra weight of M_s, the unmatched part of the subjects, >= 0.
      lambda_d: extra weight of M_d, the detail, while the gate is open, >= 0.
      lambda_c: extra weight of U, the uncertainty of the reference model, >= 0.
      tau: alignment score at which the gate opens, in [0, 1].
      gate_width: 0 for a hard gate, otherwise the width of a sigmoid around tau.
      background: weight of every location, inside and outside the prior, >= 0. It keeps the policy
        close to the reference outside the subjects.
      matched_weight: weight, instead of 1, of prior locations in M' while the gate is closed, in
        [0, 1].
    """

    index: IntScalar
    t_low: IntScalar
    t_high: IntScalar
    rho: Scalar
    lambda_s: Scalar
    lambda_d: Scalar
    lambda_c: Scalar
    tau: Scalar
    gate_width: Scalar
    background: Scalar
    matched_weight: Scalar


class Bucket(NamedTuple):
    """The structure and the parameters of one range of timesteps."""

    structure: BucketStructure
    params: BucketParams


def make_buckets(
    count: int = 4,
    *,
    timesteps: int = 1000,
    spaf: bool = True,
    dpce: bool = True,
    detail_fraction: float = 0.5,
    rho_noisy: float = 0.3,
    rho_clean: float = 0.9,
    lambda_s: float = 1.0,
    lambda_d: float = 1.0,
    lambda_c: float = 0.0,
    tau: float = 0.5,
    gate_width: float = 0.0,
    background: float = 0.5,
    matched: float = 0.5,
) -> tuple[Bucket, ...]:
    """Splits [0, timesteps) into equal buckets in the order of denoising, most noise first.

    Schedules are evaluated at the middle u = (i + 1/2) / count of bucket i, on the path from noise
    (u = 0) to image (u = 1), so that they do not depend on the number of buckets:

        rho  = rho_noisy + u (rho_clean - rho_noisy)      more of the image may match
        dpce = dpce and u >= 1 - detail_fraction          detail once structure can be aligned

    Args:
      count: number of buckets, 1 to timesteps.
      timesteps: length of the noise schedule.
      spaf, dpce: False disables the term in every bucket.
      detail_fraction: share of the denoising path with detail, counted from the image.
      rho_noisy, rho_clean: rho at u = 0 and at u = 1.
      lambda_s, lambda_d, lambda_c, tau, gate_width, background, matched: see `BucketParams`; the
        same in every bucket. lambda_c = 0 disables confidence.

    Raises:
      UserError: a value is out of its range.
    """
    if not 1 <= count <= timesteps:
        raise UserError(f"focus buckets: count is {count}; choose 1 to {timesteps}")
    for name, value in (("detail_fraction", detail_fraction), ("tau", tau), ("matched", matched)):
        if not 0 <= value <= 1:
            raise UserError(f"focus buckets: {name} is {value}; choose a number from 0 to 1")
    for name, value in (
        ("rho_noisy", rho_noisy),
        ("rho_clean", rho_clean),
        ("lambda_s", lambda_s),
        ("lambda_d", lambda_d),
        ("lambda_c", lambda_c),
        ("gate_width", gate_width),
        ("background", background),
    ):
        if not 0 <= value < float("inf"):
            raise UserError(f"focus buckets: {name} is {value}; choose a finite number >= 0")

    edges = np.rint(np.linspace(timesteps, 0, count + 1)).astype(np.int32)
    buckets = []
    for i in range(count):
        u = (i + 0.5) / count
        params = BucketParams(
            index=np.int32(i),
            t_low=edges[i + 1],
            t_high=edges[i],
            # Always float32, so that buckets of equal structure have the same types in jit.
            rho=np.float32(rho_noisy + u * (rho_clean - rho_noisy)),
            lambda_s=np.float32(lambda_s),
            lambda_d=np.float32(lambda_d),
            lambda_c=np.float32(lambda_c),
            tau=np.float32(tau),
            gate_width=np.float32(gate_width),
            background=np.float32(background),
            matched_weight=np.float32(matched),
        )
        detail = dpce and u + detail_fraction >= 1 - 1e-9  # Rounding must not remove a bucket.
        structure = BucketStructure(spaf=spaf, dpce=detail, confidence=lambda_c > 0)
        buckets.append(Bucket(structure, params))
    return tuple(buckets)


def structures(buckets: Sequence[Bucket]) -> tuple[BucketStructure, ...]:
    """Returns the distinct structures in order of first use; each has one executable."""
    return tuple(dict.fromkeys(bucket.structure for bucket in buckets))


def bucket_for_step(seed: int, step: int, count: int) -> int:
    """Returns the bucket of a step; each block of `count` steps uses every bucket once, shuffled.

    The result is a pure function of (seed, step, count), computed on the host, so that all hosts
    agree and a resumed run continues the same order.

    Args:
      seed: >= 0.
      step: optimiser step (or microbatch number), >= 0.
      count: number of buckets.

    Returns:
      An index in [0, count).
    """
    block, place = divmod(step, count)
    return _order(seed, block, count)[place]


@functools.lru_cache(maxsize=8)
def _order(seed, block, count):
    # The output of SeedSequence is the same in all versions of numpy, that of a shuffle is not.
    keys = np.random.SeedSequence((seed, block, _ROLE)).generate_state(count, np.uint64)
    return np.argsort(keys, kind="stable").tolist()


def sample_timesteps(key: PRNGKeyArray, params: BucketParams, batch: int) -> Int[Array, "batch"]:
    """Samples timesteps uniformly from [t_low, t_high), one per pair, which both images share."""
    return jax.random.randint(key, (batch,), params.t_low, params.t_high, dtype=jnp.int32)
