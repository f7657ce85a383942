"""Timestep buckets: one step works inside one range of noise, with settings of its own.

A bucket's settings come in two halves. Its *structure* defines which terms of the weight exist: it is
static and decides what is compiled. Its *parameters* (timestep range, rho, lambdas, tau) are dynamic
arguments. Buckets of equal structure share one executable, and what a structure switches off is
never traced.

    buckets = make_buckets(count=4)                                  # 4 buckets, 2 structures
    bucket = buckets[bucket_for_step(seed, step, len(buckets))]      # the same on every host
    state = jax.jit(train_step)(state, batch, bucket)                # compiled once a structure

That the focus moves with the timestep, and that detail comes in only at the clean end, is [known]
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

# Keeps the order of buckets apart from whatever else is drawn from the same seed.
_ROLE = int.from_bytes(b"buckets", "big")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BucketStructure:
    """Which terms a bucket's weight has. Hashable, and static wherever `jax.jit` meets it.

    Attributes:
      spaf: match target patches with the references; unmatched ones weigh more.
      dpce: detailed patches weigh more.
      confidence: patches of which the reference model is unsure weigh more.
    """

    spaf: bool
    dpce: bool
    confidence: bool = False

    def __str__(self) -> str:
        terms = [name for name in ("spaf", "dpce", "confidence") if getattr(self, name)]
        return "+".join(terms) or "prior"


class BucketParams(NamedTuple):
    """A bucket's dynamic half: a pytree of scalars.

    Attributes:
      index: place among the run's buckets, where what is cached for each of them is found.
      t_low, t_high: timesteps t with t_low <= t < t_high.
      rho: share of a subject's area that SPAF may match, >= 0.
      lambda_s: extra weight of M_s, the unmatched part of the subjects, >= 0.
      lambda_d: extra weight of M_d, detail, while the gate is open, >= 0.
      lambda_c: extra weight of U, where the reference model is unsure, >= 0.
      tau: alignment score from which the gate is open, in [0, 1].
      gate_width: 0 for a gate that is open or shut; else the width of a sigmoid around tau.
      background: weight of every location, inside the prior or out, >= 0. It is what holds the
        policy to the reference outside the subjects.
      matched_weight: weight, in place of 1, of prior locations in M' while the gate is shut, in [0, 1].
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
    """The parameters of one step's timestep range."""

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
    """Splits [0, timesteps) into equal buckets, in the order of denoising: the noisiest first.

    Schedules are read at the middle u = (i + 1/2) / count of a bucket on the way from noise
    (u = 0) to image (u = 1), so they do not depend on how many buckets there are:

        rho  = rho_noisy + u (rho_clean - rho_noisy)      more of the image may match
        dpce = dpce and u >= 1 - detail_fraction          detail once structure can be aligned

    Args:
      count: number of buckets, 1 to timesteps.
      timesteps: length of the noise schedule.
      spaf, dpce: switch a term off in every bucket.
      detail_fraction: share of the denoising path, counted from the clean end, with detail.
      rho_noisy, rho_clean: rho at the two ends of the path.
      lambda_s, lambda_d, lambda_c, tau, gate_width, background, matched: see `BucketParams`; the same
        in every bucket. With lambda_c = 0 no bucket has confidence.

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
            # float32 whatever the config holds, so that all buckets look alike to jit.
            rho=np.float32(rho_noisy + u * (rho_clean - rho_noisy)),
            lambda_s=np.float32(lambda_s),
            lambda_d=np.float32(lambda_d),
            lambda_c=np.float32(lambda_c),
            tau=np.float32(tau),
            gate_width=np.float32(gate_width),
            background=np.float32(background),
            matched_weight=np.float32(matched),
        )
        detail = dpce and u >= 1 - detail_fraction
        structure = BucketStructure(spaf=spaf, dpce=detail, confidence=lambda_c > 0)
        buckets.append(Bucket(structure, params))
    return tuple(buckets)


def structures(buckets: Sequence[Bucket]) -> tuple[BucketStructure, ...]:
    """The distinct structures, in order of first use: one executable is compiled for each."""
    return tuple(dict.fromkeys(bucket.structure for bucket in buckets))


def bucket_for_step(seed: int, step: int, count: int) -> int:
    """The bucket of a step: each block of `count` steps visits every bucket once, shuffled.

    A function of (seed, step) alone, without state and without a device: all hosts agree, and a
    resumed run continues the same order.

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
    # SeedSequence's output is fixed across versions of numpy, a Generator's shuffle is not.
    draws = np.random.SeedSequence((seed, block, _ROLE)).generate_state(count, np.uint64)
    return np.argsort(draws, kind="stable").tolist()


def sample_timesteps(key: PRNGKeyArray, params: BucketParams, batch: int) -> Int[Array, "batch"]:
    """Draws timesteps uniformly from [t_low, t_high), one a pair: both of its images share it."""
    return jax.random.randint(key, (batch,), params.t_low, params.t_high, dtype=jnp.int32)
