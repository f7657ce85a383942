"""Every field of a run's configuration: type, default, check and meaning, in one place.

The defaults are those of SDXL with an IP-Adapter. Files of `configs/` state what differs from them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from focusdpo_jax import objectives
from focusdpo_jax.config.fields import (
    anything,
    devices,
    dropout,
    flag,
    integer,
    mean_and_deviation,
    number,
    one_of,
    radii,
    setting,
    shares,
    text,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are divided; -1 takes what the others leave. See docs/scaling.md."""

    data: int = setting(-1, devices(), "Devices that divide a batch.", may_change=True)
    fsdp: int = setting(
        1,
        devices(),
        "Devices that divide a batch and the parameters, which are gathered layer by layer.",
        may_change=True,
    )
    tensor: int = setting(
        1, devices(), "Devices that divide the inside of layers.", may_change=True
    )

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: size}."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that a run starts from."""

    pretrained: str = setting(
        "stabilityai/stable-diffusion-xl-base-1.0",
        text(),
        "The model to start from: a folder of diffusers' layout, or its hub id where it was fetched "
        "before (nothing is downloaded); a single safetensors file of SDXL's original layout; a model "
        "folder that a run left; the name of a model of this package. Empty: random weights of `sizes`.",
    )
    adapter: str = setting(
        "",
        text(),
        "IP-Adapter file, a path or what was fetched from the hub, such as "
        "h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors. Empty: "
        "ip_adapter.safetensors of the folder. Where it has none, sft starts with a new adapter, and "
        "preference objectives are refused.",
    )
    image_encoder: str = setting(
        "",
        text(),
        "Folder of the image encoder that the adapter reads, such as "
        "h94/IP-Adapter/models/image_encoder. Empty: image_encoder/ of the folder.",
    )
    tokenizer: str = setting(
        "",
        text(),
        "Folder of vocab.json and merges.txt, or tokenizer.json, for a single file, which has none. "
        "Empty: tokenizer/ of the folder.",
    )
    prediction_type: str = setting(
        "",
        one_of("", "epsilon", "v_prediction", "v_prediction_zero_snr"),
        "What the UNet predicts, where its files do not state it or are wrong: epsilon, v_prediction, "
        "or v_prediction_zero_snr, with noise of zero terminal SNR. Empty: as the files state "
        "(scheduler_config.json; in a single file the metadata and the tensors v_pred and ztsnr).",
    )
    lora_rank: int = setting(
        0, integer(0), "Rank of the low-rank updates (LoRA); 0 leaves them out."
    )
    lora_alpha: float = setting(
        0.0,
        number(0),
        "Low-rank updates are scaled by alpha / rank, and so is the effect of a learning rate. 0 takes "
        "the alpha of the updates that the model has, or 16 for new ones.",
    )
    remat: bool = setting(
        True,
        flag(),
        "Compute resnets and transformer blocks of the UNet again in the backward pass and keep only "
        "their inputs: a third more work, several times less memory.",
        before=False,
    )
    scan_layers: bool = setting(
        False,
        flag(),
        "Run equal transformer blocks in a loop over stacked parameters. Compiles several times as "
        "fast; a step takes about twice as long on a TPU, and no longer on a CPU (docs/performance.md).",
        before=True,
    )
    sizes: Mapping[str, Any] | None = setting(
        None, anything(), "Sizes of a model of random weights (`models.generator.GeneratorConfig`)."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pairs that a run trains on."""

    source: str = setting(
        "toybox",
        one_of("toybox", "prepared"),
        "toybox: rendered images of simple shapes, for the models of this package. prepared: `path` is the "
        "folder of a data set that focusdpo_jax.prepare wrote.",
    )
    path: str = setting(
        "data",
        text(),
        "Folder under which Toybox is built, once for each seed and size; or that of the data set.",
        may_change=True,
    )
    cache: bool = setting(
        False,
        flag(),
        "Run the frozen encoders once over the data, before training, instead of in every step. The result "
        "is stored under `path`: 3.4 MiB per pair at 1024 pixels. Encoders are then loaded only to "
        "generate images.",
        may_change=True,
    )
    workers: int = setting(
        0,
        integer(0),
        "Processes that read and decode records; 0 uses threads of the training process.",
        may_change=True,
    )
    seed: int = setting(0, integer(0), "Toybox: seed of the world.")
    train_size: int = setting(256, integer(1), "Toybox: pairs to train on.")
    validation_size: int = setting(16, integer(1), "Toybox: pairs for validation.")
    test_size: int = setting(16, integer(1), "Toybox: pairs for the test.")
    subject_counts: tuple[float, ...] = setting(
        (0.2, 0.4, 0.4),
        shares(),
        "Toybox: probabilities of scenes with one, two and three subjects. The length is the largest "
        "number of subjects per pair; a plan for prepared data uses it too.",
    )
    leak_probability: float = setting(
        0.5,
        number(0, 1),
        "Toybox: probability that a disrupted subject has looks of another subject of its scene.",
    )
    subject_radii: tuple[float, ...] = setting(
        (21.0, 17.0, 14.5),
        radii(),
        "Toybox: largest radius of the subjects in scenes of one, two and three, in pixels at resolution "
        "64. Subjects that do not fit together are smaller.",
        before=(14.0, 13.0, 11.5),
    )
    pattern_scale: float = setting(
        1.1, number(0, above=True), "Toybox: magnification of patterns.", before=1.0
    )
    same_class_probability: float = setting(
        0.0, number(0, 1), "Toybox: probability that two subjects of a scene have the same class."
    )
    one_look_probability: float = setting(
        0.0, number(0, 1), "Toybox: probability that a disrupted subject differs in only one look."
    )
    nuisance_probability: float = setting(
        0.0,
        number(0, 1),
        "Toybox: probability that a rejected image has an inpainting artefact in all of its prior mask.",
    )
    prior_mask: str = setting(
        "exact",
        one_of("exact", "dilated", "box"),
        "Toybox: prior mask of a disrupted subject: its pixels, these dilated by 3 pixels (at resolution "
        "64), or the bounding box of those.",
    )
    oracle_mask: bool = setting(
        False,
        flag(),
        "Toybox: the prior mask is the truth, the pixels that a changed look affects. An upper limit for "
        "weight maps; real data has no such mask.",
    )
    second_reference_probability: float = setting(
        0.0,
        number(0, 1),
        "Toybox: probability that a subject of a scene with fewer than three has a second reference.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocusConfig:
    """FocusDPO's weight map (`focus.weighting`) and its timestep buckets."""

    buckets: int = setting(4, integer(1), "Timestep buckets.")
    features: str = setting(
        "vit",
        one_of("vit", "unet", "attention"),
        "Features that SPAF compares with the references: vit (the image encoder's features of the clean "
        "images), unet (the reference model's features of the noisy images; needs data.cache) or "
        "attention (the reference model's cross-attention to the image tokens).",
    )
    prototypes: int = setting(
        32,
        integer(1),
        "Number of prototype features per subject, and of its background in the reference image. Not used "
        "by attention.",
        before=1,
    )
    own_subject: bool = setting(
        False,
        flag(),
        "Whether a match counts only inside the subject's own mask, and not inside that of another subject.",
    )
    coverage: bool = setting(
        False,
        flag(),
        "Whether a subject can match only patches that it covers, each counted by its covered share "
        "(`focus.correspondence.match`). Includes own_subject.",
    )
    observed: str = setting(
        "reference",
        one_of("reference", "policy"),
        "Model whose activations and errors the maps are computed from, for features unet and attention and "
        "for lambda_c. policy costs another forward pass of the UNet in every batch.",
    )
    spaf: bool = setting(
        True, flag(), "Enable SPAF, which matches patches of the images with the references."
    )
    dpce: bool = setting(
        True, flag(), "Enable DPCE, which increases the weight of detailed patches."
    )
    rho_noisy: float = setting(
        0.3, number(0), "Largest matched share of a subject's area, at the highest noise level."
    )
    rho_clean: float = setting(0.9, number(0), "The same at the lowest noise level.")
    lambda_s: float = setting(
        1.0, number(0), "Additional weight of locations that do not match their reference."
    )
    lambda_d: float = setting(1.0, number(0), "Additional weight of detail.")
    lambda_c: float = setting(
        0.0,
        number(0),
        "Additional weight of locations where the reference model has a high error (`focus.confidence`); 0 "
        "disables it.",
    )
    tau: float = setting(0.5, number(0, 1), "Alignment score above which detail counts.")
    gate_width: float = setting(
        0.0, number(0), "Width of the soft gate of detail; 0 is a hard gate."
    )
    background: float = setting(
        0.5, number(0), "Weight outside the mask, where both images are equal. It divides beta."
    )
    matched: float = setting(
        0.5, number(0, 1), "Weight of matched locations while the gate is closed."
    )
    detail_fraction: float = setting(
        0.5,
        number(0, 1),
        "Share of the denoising path, counted from the image, in which detail is used.",
    )
    detail_bins: int = setting(16, integer(2), "DPCE: number of luminance bins of the entropy.")
    detail_sigma: float = setting(
        8.0,
        number(0, above=True),
        "DPCE: standard deviation of the Gaussian window, in pixels (a latent of SDXL covers 8).",
    )
    detail_colour: bool = setting(
        False,
        flag(),
        "DPCE: entropy of the red, green and blue values instead of the luminance, which is blind to edges "
        "between colours of equal luminance.",
    )
    reference_detail: bool = setting(
        False,
        flag(),
        "DPCE: multiply the detail of each subject by the relative complexity of its reference.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a run generates images."""

    steps: int = setting(30, integer(1), "DDIM steps.")
    guidance: float = setting(
        5.0, number(0), "Classifier-free guidance scale; 1 or less disables guidance."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The images that a run generates and measures."""

    scenes: int = setting(
        0,
        integer(0),
        "Test scenes that base and policy are measured on; 0 measures none. Only models with Toybox's probe "
        "can be measured.",
    )
    batch_size: int = setting(
        4, integer(1), "Scenes that are generated, and pairs that are encoded, at once."
    )
    pictures: int = setting(4, integer(0), "Scenes shown in samples/; 0 shows none.")
    validation_scenes: int = setting(
        0,
        integer(0),
        "Validation scenes measured at every sampled step, in validation.jsonl; 0 measures none. Only for "
        "models with Toybox's probe.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run."""

    seed: int = setting(0, integer(0), "Seed of all random numbers of a run.")
    resolution: int = setting(
        1024,
        integer(8),
        "Side of the images in pixels, a multiple of 8 (the pixels per latent).",
    )
    dtype: str = setting(
        "bfloat16",
        one_of("float32", "bfloat16"),
        "Type of the computation and of frozen parameters. Trained parameters, losses, norms, softmax and "
        "noise schedules are float32 in both.",
        before="float32",
    )
    objective: str = setting(
        "focus_dpo",
        one_of(*objectives.names()),
        "Training objective; `python -m focusdpo_jax.objectives` lists all. focus_dpo (FocusDPO), dpo "
        "(Diffusion-DPO), prior_dpo (weighted by the mask of where the pair differs), patch_dpo "
        "(PatchDPO), mapo (MaPO), sft (denoising error of the chosen image), subject_sft (the same, with a "
        "higher weight on subjects).",
    )
    trainable: str = setting(
        "adapter",
        one_of("adapter", "lora", "full", "generator"),
        "Trained parameters: adapter (IP-Adapter: resampler or projection, and image keys and values of "
        "the UNet; about 0.4 billion parameters of SDXL), lora (low-rank updates of the UNet's attention), "
        "full (UNet and adapter, 3 billion: 16 bytes each with gradient and optimiser) or generator (also "
        "the text encoders; supervised objectives only).",
    )
    beta: float = setting(
        5000.0,
        number(0, above=True),
        "Strength of the pull towards the reference model. 5000 is Diffusion-DPO's value for SDXL, where "
        "every location has the same weight. focus_dpo and prior_dpo give the background less weight, so "
        "that the same beta is 2 to 3 times as strong; see the logged logit scale (docs/method.md).",
    )
    anchor: float = setting(
        0.0,
        number(0),
        "Weight of the chosen image's denoising error that is added to the preference loss "
        "(`focus.losses`); 0 is FocusDPO as in the paper.",
    )
    anchor_fades: bool = setting(
        False, flag(), "Whether the anchor fades with the slope of the preference loss."
    )
    match_beta: bool = setting(
        False,
        flag(),
        "Whether beta is divided by the relative scale of the weighted margin (`focus.losses.relative_scale`), "
        "so that it is as strong as the same beta of Diffusion-DPO.",
    )
    loser_limit: float = setting(
        0.0,
        number(0),
        "Largest rise of the rejected image's error that counts, as a share of the reference model's error; "
        "0 is no limit.",
    )
    preserve_winner: bool = setting(
        False,
        flag(),
        "dpo, prior_dpo, focus_dpo: whether the gradient of the rejected image is scaled down so that the "
        "chosen image's error does not rise, to first order in the predictions (Diffusion-SDPO, arXiv "
        "2511.03317).",
    )
    condition_dropout: tuple[float, ...] = setting(
        (0.0, 0.0, 0.0),
        dropout(),
        "Probabilities that a pair loses its caption, its references, and both, for classifier-free "
        "guidance. Both images of a pair, and policy and reference model, lose the same.",
    )
    rejected_share: float = setting(
        0.0,
        number(0, 1),
        "Supervised objectives: probability of training on the rejected image of a pair instead of the "
        "chosen one.",
    )
    timestep_logits: tuple[float, ...] = setting(
        (),
        mean_and_deviation(),
        "Supervised objectives: mean and standard deviation of logit-normal timesteps; () samples "
        "timesteps uniformly.",
    )
    steps: int = setting(2000, integer(1), "Optimiser steps.", may_change=True)
    batch_size: int = setting(
        8,
        integer(1),
        "Pairs per batch, over all devices. Per pair, the policy and the reference model each process two "
        "images. 8 is for one GPU of 80 GB; use 8 per chip of such memory, and accumulate = 1.",
    )
    accumulate: int = setting(
        4,
        integer(1),
        "Batches whose gradients are averaged in one step. With as many as there are buckets, every step "
        "uses every bucket once. Needs memory for a sum of gradients.",
    )
    optimizer: str = setting(
        "adamw",
        one_of("adamw", "muon"),
        "adamw, or muon (Muon for matrices, AdamW for the rest), which needs half the optimiser memory. "
        "Its updates have the size of AdamW's, so that the same learning rates work.",
    )
    learning_rate: float = setting(
        1e-5, number(0, above=True), "Peak of the learning rate, after a linear warm-up."
    )
    warmup_steps: int = setting(200, integer(0), "Steps of the warm-up.")
    decay: str = setting(
        "constant",
        one_of("constant", "cosine", "wsd"),
        "Learning rate after the warm-up: constant, cosine (to zero), or wsd (constant, then linear to zero "
        "over the last fifth of the steps).",
    )
    weight_decay: float = setting(1e-2, number(0), "Decoupled weight decay of AdamW and Muon.")
    adam_b2: float = setting(0.999, number(0, 1, below=True), "Decay of AdamW's second moment.")
    gradient_clip: float = setting(1.0, number(0, above=True), "Largest norm of the gradient.")
    ema_decay: float = setting(
        0.0,
        number(0, 1, below=True),
        "Decay per optimiser step of the moving average of trained parameters. The average is evaluated and "
        "saved as the model; 0 disables it.",
    )
    log_every: int = setting(
        10,
        integer(0),
        "Steps between logged steps; 0 logs only the last step and steps with a checkpoint, which are always "
        "logged.",
        may_change=True,
    )
    checkpoint_every: int = setting(
        100,
        integer(0),
        "Steps between checkpoints; 0 saves only the last step, which is always saved.",
        may_change=True,
    )
    keep_checkpoints: int = setting(
        2, integer(1), "Number of checkpoints to keep.", may_change=True
    )
    sample_every: int = setting(
        250,
        integer(0),
        "Steps between samples; 0 generates samples only at the last step.",
        may_change=True,
    )
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    focus: FocusConfig = FocusConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def dropout_chances(self) -> tuple[float, float, float]:
        """Chances of losing the caption alone, the references alone, and both (`condition_dropout`)."""
        value = self.condition_dropout
        chances = list(value) if isinstance(value, (tuple, list)) else [value]
        caption, references, both = chances * (3 // len(chances))
        return caption, references, both
