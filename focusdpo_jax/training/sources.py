"""Feature sources of SPAF: three ways to compute the similarity of subjects and image locations.

`config.focus.features` selects one of

    vit        features of the frozen image encoder on clean images. The similarity is computed
               once, with the data; the timestep only changes rho.
    unet       features of a block of the reference model. The references are denoised once, with
               the data, at the noise of each bucket, and pooled to prototypes. The features of the
               images are captured in the reference pass of the step.
    attention  the cross-attention of image locations to a subject's tokens, also captured in the
               reference pass.

The reference pass runs in every step of a preference objective in any case, so that capturing adds
almost no cost. The paper uses the attention of its generator [known]; these variants for a UNet are
[ours].
"""

import jax
import jax.numpy as jnp

from focusdpo_jax.focus import correspondence
from focusdpo_jax.focus.grids import share_on_grid
from focusdpo_jax.models.generator import Conditioning

# Separates the noise on references from other random numbers of the same seed.
_ROLE = int.from_bytes(b"refs", "big")


def make_source(generator, config, params):
    """Returns the source that `config.focus.features` selects.

    Args:
      generator: a Generator.
      config: the `RunConfig`.
      params: BucketParams of the run's buckets, in the order of their index.

    Returns:
      An object with
        capture: names of activations that the reference pass captures (`Generator.denoise`).
        parts: parts of the generator whose parameters `encode` reads.
        settings: JSON values that `encode` depends on besides parameters and images.
        reads_references: whether the captured activations depend on the references of the pass, so
          that dropped references cannot be matched.
        encode(parameters, batch, images, references) -> (prototypes, similarity): takes a
          PreferenceBatch, its images [B * P, H, W, 3] in [0, 1] with those of a pair in succession,
          and the `ImageView` [B, S] of its references. Returns prototypes [B, K, S, 2, count, D]
          for K buckets, and similarities [B * P, S + 1, g, g] with the subjects and, last, the
          backgrounds. A result is None if it is computed in the step or not used.
        similarity(encoded, captured, index) -> (similarity [B * P, S, h, w] with the subjects,
          [B * P, h, w] with the references' backgrounds or None, bool [B, S]): takes EncodedPairs,
          the captured activations and the bucket's index. The last output marks slots that can be
          matched.
    """
    if config.focus.features == "vit":
        return EncoderSource(generator, config.focus.prototypes)
    if config.focus.features == "attention":
        return AttentionSource(generator)
    middles = [(int(p.t_low) + int(p.t_high) - 1) // 2 for p in params]
    return UNetSource(generator, middles, config.focus.prototypes, config.seed)


class EncoderSource:
    """Features of the frozen image encoder on clean images."""

    capture, parts = (), ("image_encoder",)
    reads_references = False

    def __init__(self, generator, count):
        """Initialises it for `count` prototypes per subject."""
        self._generator, self._count = generator, count
        self.settings = ["vit", count, "similarity"]

    def encode(self, parameters, batch, images, references):
        """See `make_source`."""
        side = self._generator.patch_grid
        features = self._generator.encode_reference(parameters, images).features[:, 1:]
        prototypes = correspondence.subject_and_background_prototypes(
            references.features[:, :, 1:],
            masks_on_grid(batch.reference_masks, (side, side)),
            batch.present,
            self._count,
        )
        subjects, background, _ = _compare(
            prototypes, features.reshape(-1, side, side, features.shape[-1])
        )
        return None, jnp.concatenate([subjects, background[:, None]], axis=1)

    def similarity(self, encoded, captured, index):
        """See `make_source`."""
        del captured, index  # Independent of the timestep.
        similarity = encoded.similarity.reshape(-1, *encoded.similarity.shape[2:])
        # The similarity of a subject without prototypes is -1 everywhere.
        known = jnp.any(encoded.similarity[:, 0, :-1] > -1, axis=(2, 3))
        return similarity[:, :-1], similarity[:, -1], known


class UNetSource:
    """Features of a block of the reference model, for references and images with similar noise."""

    parts = ("unet", "adapter", "text_encoder", "text_encoder_2", "vae", "image_encoder")
    reads_references = False

    def __init__(self, generator, timesteps, count, seed):
        """Initialises it.

        Args:
          generator: a Generator.
          timesteps: timestep at which the references are denoised, for each bucket.
          count: prototypes per subject.
          seed: seed of the noise on references.
        """
        self._generator, self._count, self._seed = generator, count, seed
        self._timesteps = jnp.asarray(timesteps)
        self._block = generator.match_captures["unet"]
        self.capture = (self._block,)
        self.settings = ["unet", count, *timesteps, seed]

    def encode(self, parameters, batch, images, references):
        """Denoises every reference once for each bucket, one bucket at a time.

        The conditioning is the pair's caption, with the reference itself as the only subject. All
        slots of a pair share the noise, so that their order has no effect.
        """
        generator = self._generator
        count, slots = batch.present.shape
        size = images.shape[1:3]
        pixels = jax.image.resize(
            batch.references.astype(jnp.float32) / 255,
            (count, slots, *size, 3),
            "linear",
            antialias=True,
        )
        mean, _ = generator.encode_latents(parameters, pixels.reshape(-1, *size, 3))
        text, pooled = generator.encode_text(parameters, batch.token_ids)
        tokens = generator.subject_tokens(parameters, references)

        def each(x):
            """Repeats [B, ...] for every slot: [B * S, ...]."""
            return jnp.repeat(x, slots, axis=0)

        conditioning = Conditioning(
            text=each(text),
            pooled=each(pooled),
            time_ids=each(batch.time_ids),
            image_tokens=tokens.reshape(-1, 1, *tokens.shape[2:]),
            image_present=batch.present.reshape(-1, 1),
        )
        key = jax.random.fold_in(jax.random.key(self._seed), _ROLE)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch.index)

        def prototypes_at(timestep):
            noise = jax.vmap(
                lambda k: jax.random.normal(jax.random.fold_in(k, timestep), mean.shape[1:])
            )(keys)
            timesteps = jnp.full(count * slots, timestep)
            _, captured = generator.denoise(
                parameters,
                generator.schedule.add_noise(mean, each(noise), timesteps),
                timesteps,
                conditioning,
                capture=self.capture,
            )
            features = captured[self._block]
            grid = features.shape[1:3]
            return correspondence.subject_and_background_prototypes(
                features.reshape(count, slots, -1, features.shape[-1]),
                masks_on_grid(batch.reference_masks, grid),
                batch.present,
                self._count,
            )

        return jnp.moveaxis(jax.lax.map(prototypes_at, self._timesteps), 0, 1), None

    def similarity(self, encoded, captured, index):
        """See `make_source`."""
        prototypes = jax.lax.dynamic_index_in_dim(encoded.prototypes, index, 1, keepdims=False)
        return _compare(prototypes, captured[self._block])


class AttentionSource:
    """The image branch of the UNet's cross-attention, at the finest level that has attention.

    The attention is not normalised over subjects, since normalised shares would be 1 everywhere for
    the only subject of an image.
    """

    parts, settings = (), ["attention"]
    reads_references = True

    def __init__(self, generator):
        self._name = generator.match_captures["attention"]
        self.capture = (self._name,)

    def encode(self, parameters, batch, images, references):
        """See `make_source`."""
        del parameters, batch, images, references  # Only the reference pass reads them.
        return None, None

    def similarity(self, encoded, captured, index):
        """See `make_source`."""
        del index
        return jnp.moveaxis(captured[self._name], -1, 1), None, encoded.present


def masks_on_grid(masks, grid):
    """Returns the share of each cell of a grid (h, w) that masks [B, S, R, R] cover: [B, S, hw]."""
    return share_on_grid(masks, grid).reshape(*masks.shape[:2], -1)


def _compare(prototypes, targets):
    """Compares prototypes [B, S, 2, count, D] with target features [B * P, h, w, D].

    Returns the results of `similarity` in `make_source`.
    """
    repeated = jnp.repeat(prototypes, len(targets) // len(prototypes), axis=0)
    subjects, background = correspondence.prototype_similarity(repeated, targets)
    return subjects, background, jnp.any(prototypes[:, :, 0] != 0, axis=(2, 3))
