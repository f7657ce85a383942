"""Time and error of the kernel chosen for each attention of SDXL's networks, compared with XLA's.

The shapes are recorded while the networks are traced from their configurations. For each shape,
`plain` is `jax.nn.dot_product_attention(implementation="xla")` and `ours` is
`models.attention.attend`. `cudnn` is also measured where it was not chosen, to check the choice.
The error of some queries of the first example is computed against float64 on the host, for the
output and, where the attention is trained, for all three gradients.
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

# Queries whose error is computed, and shapes whose programs are compiled concurrently.
_SAMPLED_QUERIES, _COMPILED_AT_ONCE = 64, 16
# Each iteration changes its inputs by this step, so that the compiler cannot remove iterations.
_STEP_SIZE = 1e-3


class Shape(NamedTuple):
    """The shape of an attention.

    Attributes:
      network: name of the first network that uses it.
      queries, keys, heads, head_dim: sizes.
      masked: whether some keys are masked.
      causal: whether a query attends only to keys up to its position.
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
    """The distinct Shapes of a generator's networks, in the order of `resolutions`.

    Args:
      sizes: GeneratorConfig.
      resolutions: sides of the images in pixels.
      references: numbers of subject references.
      others: whether to add other networks of a run at their published sizes: image encoders and
        adapters, DINO and DINOv2.
    """
    shapes = {}

    def record(network, module, *inputs, trained=False, method=None):
        arrays = [
            jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs
        ]
        with attention.recorded_calls() as calls:
            jax.eval_shape(
                functools.partial(module.init, method=method), jax.random.key(0), *arrays
            )
        for call in sorted(calls or (), reverse=True):
            key = (call.queries, call.keys, call.heads, call.head_dim, call.masked, call.causal)
            existing = shapes.get(key)
            shapes[key] = Shape(
                existing.network if existing else network,
                *key,
                trained or bool(existing and existing.trained),
            )

    # One block of each kind, since blocks of a kind have equal shapes.
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
            # Both images of a pair attend to the same text and references.
            record(
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
    record(
        "resampler",
        subject_adapter(sizes.adapter),
        (1, 1, patches, sizes.adapter.input_dim),
        trained=True,
    )
    encoder = sizes.image_encoder
    record(
        "CLIP, image", CLIPVision(_shallow(encoder)), (1, encoder.image_size, encoder.image_size, 3)
    )
    for part in (sizes.text_encoder, sizes.text_encoder_2):
        record("CLIP, text", CLIPText(_shallow(part)), jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    for side in resolutions:
        record(f"autoencoder, {side} px", VAE(sizes.vae), (1, side, side, 3))
    for name, module, *inputs in _others() if others else ():
        record(name, module, *inputs, trained="resampler" in name)
    return list(shapes.values())


def _shallow(tower):
    return dataclasses.replace(tower, num_layers=1)


def _others():
    """Yields (name, module, *inputs) of networks that are not in SDXL or IP-Adapter-Plus."""
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
    for side in (224, 448):  # Resolution for image features, and for patch features.
        yield f"DINO, {side} px", DINO(small), (1, side, side, 3)
        yield f"DINOv2, {side} px", DINO(base), (1, side, side, 3)


def measure(settings: Any, context: Any):
    """Yields one row per shape and use ("training" or "inference")."""
    target = platforms.target_of(jax.devices()[0])
    sizes = cases.generator_sizes(settings["size"])
    shapes = attention_shapes(
        sizes, settings["resolutions"], settings["references"], others=settings["size"] == "full"
    )[:: settings["every"]]
    pending = [
        (shape, use)
        for use in ("training", "inference")
        for shape in shapes
        if shape.trained or use == "inference"
    ]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(pending), _COMPILED_AT_ONCE):
            if time.monotonic() - start > 0.85 * context.seconds:
                raise TimeoutError(
                    f"no time left for {len(pending) - first} of {len(pending)} cases"
                )
            group = pending[first : first + _COMPILED_AT_ONCE]
            programs = [
                {
                    name: pool.submit(_compile, settings, shape, use, function)
                    for name, function in _kernels(target, shape).items()
                }
                for shape, use in group
            ]
            # Compilation would disturb the measurements.
            concurrent.futures.wait([future for kernels in programs for future in kernels.values()])
            for (shape, use), kernels in zip(group, programs, strict=True):
                yield _row(settings, target, shape, use, kernels)


def _kernels(target, shape):
    """The kernels to measure, {name: function of query, key, value [B, N, C] and mask}."""

    def reference_kernel(implementation, query, key, value, mask):
        heads = [attention.split_heads(x, shape.heads) for x in (query, key, value)]
        if mask is not None:  # cuDNN does not broadcast a mask over queries.
            rows = shape.queries if implementation == "cudnn" else 1
            mask = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, rows, shape.keys))
        return jax.nn.dot_product_attention(
            *heads, mask=mask, is_causal=shape.causal, implementation=implementation
        ).reshape(query.shape)

    def ours(query, key, value, mask):
        return attention.attend(query, key, value, shape.heads, key_mask=mask, causal=shape.causal)

    kernels = {"plain": functools.partial(reference_kernel, "xla"), "ours": ours}
    if target.platform == "gpu" and not _chosen_kernel(target, shape).startswith("cudnn"):
        kernels["cudnn"] = functools.partial(reference_kernel, "cudnn")
    return kernels


def _chosen_kernel(target, shape):
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
    """Compiles the program (step size, *arguments) -> results of its last iteration."""

    def results_of(query, key, value, cotangent, mask):
        if use == "inference":
            return (function(query, key, value, mask),)
        out, gradient = jax.vjp(lambda *x: function(*x, mask), query, key, value)
        return out, *gradient(cotangent)

    def program(step_size, query, key, value, cotangent, mask):
        def iterate(carry, _):
            inputs, _ = carry
            # jit hides the arity from pyright.
            results = results_of(*inputs, cotangent, mask)  # pyright: ignore[reportCallIssue]
            # Gradients change their own inputs; in inference, the output changes the query.
            steps = results[1:] or results
            inputs = (
                tuple(x + step_size * step for x, step in zip(inputs, steps)) + inputs[len(steps) :]
            )
            return (inputs, results), None

        shapes = jax.eval_shape(results_of, query, key, value, cotangent, mask)
        initial = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
        carry, _ = jax.lax.scan(
            iterate, ((query, key, value), initial), length=settings["iterations"]
        )
        return carry[1]

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arguments(settings, shape, 0)[0]
    )
    return jax.jit(program).lower(jax.ShapeDtypeStruct((), jnp.bfloat16), *abstract).compile()


def _arguments(settings, shape, seed):
    """Random (query, key, value, cotangent, mask) as numpy arrays, and the sampled queries."""
    rng, batch = np.random.default_rng(seed), settings["batch"]
    width = shape.heads * shape.head_dim

    def normal(length):
        return rng.standard_normal((batch, length, width), np.float32).astype(jnp.bfloat16)

    rows = np.sort(rng.choice(shape.queries, min(_SAMPLED_QUERIES, shape.queries), replace=False))
    mask = None
    if shape.masked:  # As if the last references were absent.
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
    # Only the sampled queries of the first example have a cotangent.
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
        "kernel": _chosen_kernel(target, shape),
        **shape._asdict(),
        "batch": settings["batch"],
        "milliseconds": {},
        "forward_error": {},
        "gradient_error": {},
        "refused": {},
    }
    placed = jax.device_put(arguments)
    for name, future in kernels.items():
        try:
            program = future.result()
            results = program(jnp.bfloat16(0), *placed[:3], jax.device_put(cotangent), placed[4])
            errors = _errors(results, exact, rows)
            row["forward_error"][name] = errors[0]
            if use == "training":
                row["gradient_error"][name] = max(errors[1:])
            row["milliseconds"][name] = _milliseconds(settings, program, placed)
        except Exception as error:  # Kernels reject shapes with any exception.
            row["refused"][name] = str(error).splitlines()[0][:200] or repr(error)
    times = row["milliseconds"]
    if {"plain", "ours"} <= times.keys():
        row["ratio"] = times["plain"] / times["ours"]
    return row


def _milliseconds(settings, program, arguments):
    """Milliseconds per iteration, as the median over calls."""
    step_size, seconds = jnp.bfloat16(_STEP_SIZE), []
    jax.block_until_ready(program(step_size, *arguments))
    for _ in range(settings["repeats"]):
        start = time.perf_counter()
        jax.block_until_ready(program(step_size, *arguments))
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds)) / settings["iterations"]


def exact_rows(shape, query, key, value, cotangent, mask, rows):
    """Attention of some queries in float64, with its gradients.

    Args:
      shape: Shape.
      query, cotangent: [Q, C] of one example. The cotangent is zero except at `rows`.
      key, value: [K, C].
      mask: bool [K] or None.
      rows: positions of the queries, [R].

    Returns:
      Output [R, C] and gradients of query [R, C], key [K, C] and value [K, C], in float64.
    """

    def heads(x):
        return x.astype(np.float64).reshape(len(x), shape.heads, shape.head_dim).transpose(1, 0, 2)

    def merge_heads(x):
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
            merge_heads,
            (
                weights @ value,
                to_logits @ key,
                to_logits.transpose(0, 2, 1) @ query,
                weights.transpose(0, 2, 1) @ cotangent,
            ),
        )
    )


def _errors(results, exact, rows):
    """|result - exact| / |exact| of each result; infinite if it is not finite."""
    errors = []
    for position, (result, expected) in enumerate(zip(results, exact)):
        actual = np.asarray(result)[0].astype(np.float64)
        actual = actual[rows] if position < 2 else actual
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        errors.append(float(error) if np.isfinite(error) else float("inf"))
    return errors
