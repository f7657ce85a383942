"""Every attention of SDXL's networks: the kernel that was chosen beside XLA's own, time and error.

Shapes are read off the networks themselves, which are traced from their configurations. For each, `plain`
is `jax.nn.dot_product_attention(implementation="xla")`, `ours` is `models.attention.attend`, and `cudnn`
is asked where it was not chosen, to see whether it should have been. The error is that of a few queries
of the first example against float64 on the host, forward and, where the attention is trained, in all
three gradients.
"""

import concurrent.futures
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import attention, platforms
from focusdpo_jax.models.clip import CLIPText, CLIPVision, CLIPVisionConfig
from focusdpo_jax.models.dino import DINO, DINOConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig, subject_adapter
from focusdpo_jax.models.unet import UNet
from focusdpo_jax.models.vae import VAE

from . import cases

# Queries whose error is taken, and shapes whose programs are compiled side by side.
_SAMPLED, _AT_ONCE = 64, 16
# How far an iteration moves its arguments: enough that none can be left out.
_RATE = 1e-3


class Shape(NamedTuple):
    """An attention, and where it was found.

    Attributes:
      network: name.
      queries, keys, heads, head_dim: sizes.
      masked, causal: whether keys are masked, or seen up to the query's position only.
      trained: whether a run differentiates it.
    """

    network: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    masked: bool
    causal: bool
    trained: bool


def attention_shapes(sizes: Any, resolutions, references, others=True):
    """The Shapes of a generator's networks, each once, in the order of `resolutions`.

    Args:
      sizes: GeneratorConfig.
      resolutions: sides of the images in pixels.
      references: numbers of subject references.
      others: also the networks that are not the generator's but of a run: other image encoders and
        adapters, DINO and DINOv2. They have their published sizes.
    """
    found = {}

    def note(network, module, *inputs, trained=False, method=None):
        arrays = [
            jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs
        ]
        with attention.recorded_calls() as calls:
            jax.eval_shape(
                functools.partial(module.init, method=method), jax.random.key(0), *arrays
            )
        for call in sorted(calls or (), reverse=True):
            key = (call.queries, call.keys, call.heads, call.head_dim, call.masked, call.causal)
            before = found.get(key)
            found[key] = Shape(
                before.network if before else network,
                *key,
                trained or bool(before and before.trained),
            )

    # One block of each kind has all the shapes of many.
    unet = dataclasses.replace(
        sizes.unet,
        transformer_layers_per_block=tuple(
            min(depth, 1) for depth in sizes.unet.transformer_layers_per_block
        ),
        mid_transformer_layers=min(sizes.unet.mid_transformer_layers, 1),
        layers_per_block=1,
        image_context=True,
        lora_rank=0,
    )
    tokens, width = sizes.text_encoder.max_length, sizes.unet.cross_attention_dim
    for side in resolutions:
        latents = side // sizes.vae.factor
        for count in references:
            # Both images of a pair ask the same text and references.
            note(
                f"UNet, {side} px",
                UNet(unet),
                (2, latents, latents, unet.in_channels),
                (2,),
                (1, tokens, width),
                (1, unet.pooled_dim),
                (1, 6),
                (1, count, sizes.adapter.num_tokens, width),
                jax.ShapeDtypeStruct((1, count), bool),
                trained=True,
            )
    patches = 1 + sizes.image_encoder.num_patches
    note(
        "resampler",
        subject_adapter(sizes.adapter),
        (1, 1, patches, sizes.adapter.input_dim),
        trained=True,
    )
    encoder = sizes.image_encoder
    note(
        "CLIP, image", CLIPVision(_shallow(encoder)), (1, encoder.image_size, encoder.image_size, 3)
    )
    for part in (sizes.text_encoder, sizes.text_encoder_2):
        note("CLIP, text", CLIPText(_shallow(part)), jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    for side in resolutions:
        note(f"autoencoder, {side} px", VAE(sizes.vae), (1, side, side, 3))
    for name, module, *inputs in _others() if others else ():
        note(name, module, *inputs, trained="resampler" in name)
    return list(found.values())


def _shallow(tower):
    return dataclasses.replace(tower, num_layers=1)


def _others():
    """Networks that a run may have beside SDXL's and IP-Adapter-Plus's own: (name, module, inputs)."""
    big = CLIPVisionConfig(hidden_size=1664, num_layers=1, intermediate_size=8192)
    yield "CLIP bigG, image", CLIPVision(big), (1, 224, 224, 3)
    grounding = SubjectAdapterConfig(kind="grounding", depth=1)
    yield (
        "grounding resampler",
        subject_adapter(grounding),
        (1, 1, 257, grounding.input_dim),
        (1, 1, grounding.phrase_dim),
        (1, 1, 4),
    )
    small = DINOConfig(num_layers=1)
    base = DINOConfig(
        num_layers=1,
        patch_size=14,
        image_size=518,
        hidden_size=768,
        num_heads=12,
        intermediate_size=3072,
        layer_scale=True,
    )
    for side in (224, 448):  # For images, and for their patches.
        yield f"DINO, {side} px", DINO(small), (1, side, side, 3)
        yield f"DINOv2, {side} px", DINO(base), (1, side, side, 3)


def measure(settings: Any, context: Any):
    """Yields a row for each shape and use, "inference" or "training"."""
    target = platforms.target_of(jax.devices()[0])
    wide = cases.generator_sizes(settings["size"])
    shapes = attention_shapes(
        wide, settings["resolutions"], settings["references"], others=settings["size"] == "full"
    )[:: settings["every"]]
    asked = [
        (shape, use)
        for use in ("training", "inference")
        for shape in shapes
        if shape.trained or use == "inference"
    ]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(asked), _AT_ONCE):
            if time.monotonic() - start > 0.85 * context.seconds:
                raise TimeoutError(f"no time for {len(asked) - first} of {len(asked)}")
            some = asked[first : first + _AT_ONCE]
            programs = [
                {
                    name: pool.submit(_compile, settings, shape, use, function)
                    for name, function in _kernels(target, shape).items()
                }
                for shape, use in some
            ]
            # Nothing is measured while something compiles.
            concurrent.futures.wait([future for kernels in programs for future in kernels.values()])
            for (shape, use), kernels in zip(some, programs, strict=True):
                yield _row(settings, target, shape, use, kernels)


def _kernels(target, shape):
    """{name: attention of projected [B, N, C] and a mask}."""

    def of_heads(implementation, query, key, value, mask):
        heads = [attention.split_heads(x, shape.heads) for x in (query, key, value)]
        if mask is not None:  # cuDNN takes no mask that is one for all queries.
            rows = shape.queries if implementation == "cudnn" else 1
            mask = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, rows, shape.keys))
        return jax.nn.dot_product_attention(
            *heads, mask=mask, is_causal=shape.causal, implementation=implementation
        ).reshape(query.shape)

    def ours(query, key, value, mask):
        return attention.attend(query, key, value, shape.heads, key_mask=mask, causal=shape.causal)

    kernels = {"plain": functools.partial(of_heads, "xla"), "ours": ours}
    if target.platform == "gpu" and not _chosen(target, shape).startswith("cudnn"):
        kernels["cudnn"] = functools.partial(of_heads, "cudnn")
    return kernels


def _chosen(target, shape):
    return attention.choose_kernel(
        target,
        jnp.bfloat16,
        shape.queries,
        shape.keys,
        shape.head_dim,
        masked=shape.masked,
        causal=shape.causal,
    )


def _compile(settings, shape, use, function):
    """The compiled program (rate, arguments) -> what the last of its iterations made."""

    def made(query, key, value, cotangent, mask):
        if use == "inference":
            return (function(query, key, value, mask),)
        out, gradient = jax.vjp(lambda *x: function(*x, mask), query, key, value)
        return out, *gradient(cotangent)

    def program(rate, query, key, value, cotangent, mask):
        def once(carry, _):
            moved, _ = carry
            results = made(*moved, cotangent, mask)  # pyright: ignore[reportCallIssue]: jit hides the arity
            # A gradient moves its own argument, or else the result moves the query.
            steps = results[1:] or results
            moved = tuple(x + rate * step for x, step in zip(moved, steps)) + moved[len(steps) :]
            return (moved, results), None

        shapes = jax.eval_shape(made, query, key, value, cotangent, mask)
        nothing = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
        carry, _ = jax.lax.scan(once, ((query, key, value), nothing), length=settings["iterations"])
        return carry[1]

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arguments(settings, shape, 0)[0]
    )
    return jax.jit(program).lower(jax.ShapeDtypeStruct((), jnp.bfloat16), *abstract).compile()


def _arguments(settings, shape, seed):
    """(query, key, value, cotangent, mask), and the queries that are looked at, on the host."""
    rng, batch = np.random.default_rng(seed), settings["batch"]
    width = shape.heads * shape.head_dim

    def normal(length):
        return rng.standard_normal((batch, length, width), np.float32).astype(jnp.bfloat16)

    rows = np.sort(rng.choice(shape.queries, min(_SAMPLED, shape.queries), replace=False))
    mask = None
    if shape.masked:  # As with the last of several references absent.
        mask = np.ones((batch, shape.keys), bool)
        mask[:, max(shape.keys * 2 // 3, 1) :] = False
    return (
        normal(shape.queries),
        normal(shape.keys),
        normal(shape.keys),
        normal(shape.queries),
        mask,
    ), rows


def _row(settings, target, shape, use, kernels):
    arguments, rows = _arguments(settings, shape, 1)
    # Gradients of the sampled queries of one example alone: the others are known to be zero.
    cotangent = np.zeros_like(arguments[3])
    cotangent[0, rows] = arguments[3][0, rows]
    exact = exact_rows(
        shape,
        arguments[0][0],
        arguments[1][0],
        arguments[2][0],
        cotangent[0],
        None if arguments[4] is None else arguments[4][0],
        rows,
    )
    row = {
        "key": f"{shape} {use}",
        "use": use,
        "kernel": _chosen(target, shape),
        **shape._asdict(),
        "batch": settings["batch"],
        "milliseconds": {},
        "forward_error": {},
        "gradient_error": {},
        "refused": {},
    }
    placed = jax.device_put(arguments)
    for name, compiling in kernels.items():
        try:
            program = compiling.result()
            results = program(jnp.bfloat16(0), *placed[:3], jax.device_put(cotangent), placed[4])
            errors = _errors(results, exact, rows)
            row["forward_error"][name] = errors[0]
            if use == "training":
                row["gradient_error"][name] = max(errors[1:])
            row["milliseconds"][name] = _milliseconds(settings, program, placed)
        except Exception as error:  # A kernel may refuse a shape in any way; the others go on.
            row["refused"][name] = str(error).splitlines()[0][:200] or repr(error)
    times = row["milliseconds"]
    if {"plain", "ours"} <= times.keys():
        row["ratio"] = times["plain"] / times["ours"]
    return row


def _milliseconds(settings, program, arguments):
    """Of one attention, the median of a few calls of many iterations."""
    rate, seconds = jnp.bfloat16(_RATE), []
    jax.block_until_ready(program(rate, *arguments))
    for _ in range(settings["repeats"]):
        start = time.perf_counter()
        jax.block_until_ready(program(rate, *arguments))
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds)) / settings["iterations"]


def exact_rows(shape, query, key, value, cotangent, mask, rows):
    """Attention of some queries in float64, and its gradients.

    Args:
      query, cotangent: [Q, C] of one example; key, value: [K, C]. The cotangent is zero but at `rows`.
      mask: bool [K] or None.
      rows: [R], positions of queries.

    Returns:
      float64 output [R, C] and gradients of query [R, C], key and value [K, C].
    """

    def heads(x):
        return x.astype(np.float64).reshape(len(x), shape.heads, shape.head_dim).transpose(1, 0, 2)

    def joined(x):
        return x.transpose(1, 0, 2).reshape(x.shape[1], -1)

    query, key, value, cotangent = map(heads, (query[rows], key, value, cotangent[rows]))
    scale = shape.head_dim**-0.5
    logits = scale * query @ key.transpose(0, 2, 1)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    if shape.causal:
        logits = np.where(np.arange(shape.keys) <= rows[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    to_weights = cotangent @ value.transpose(0, 2, 1)
    to_logits = scale * weights * (to_weights - (to_weights * weights).sum(-1, keepdims=True))
    return tuple(
        map(
            joined,
            (
                weights @ value,
                to_logits @ key,
                to_logits.transpose(0, 2, 1) @ query,
                weights.transpose(0, 2, 1) @ cotangent,
            ),
        )
    )


def _errors(results, exact, rows):
    """|result - exact| / |exact| of each result; infinite where one is not finite."""
    errors = []
    for position, (result, right) in enumerate(zip(results, exact)):
        found = np.asarray(result)[0].astype(np.float64)
        found = found[rows] if position < 2 else found
        error = np.linalg.norm(found - right) / np.linalg.norm(right)
        errors.append(float(error) if np.isfinite(error) else float("inf"))
    return errors
