r"""FocusDPO on Toybox, the embedded default: a few minutes on a laptop, nothing to download.

    python -m focusdpo_jax.main --config=configs/toybox_dpo.py
    python -m focusdpo_jax.main --config=configs/toybox_dpo.py --workdir=runs/dpo \
        --config.objective=dpo
"""

import ml_collections


def get_config():
    """The configuration; every field can be set on the command line as --config.FIELD=VALUE."""
    config = ml_collections.ConfigDict()
    # Every random draw of a run derives from it.
    config.seed = 0
    # Side of the pictures in pixels.
    config.resolution = 64
    # Type of the computation, and of what is not trained: "float32" or "bfloat16".
    config.dtype = "float32"

    # "focus_dpo", or one of its rivals over the same step: "dpo" (Diffusion-DPO: every location
    # counts the same), "prior_dpo" (the mask of where the pair differs alone), "sft" (the
    # denoising error of the chosen picture; no reference model), "subject_sft" (the same with
    # subjects weighing more than background), "patch_dpo" (PatchDPO: the denoising error of both
    # pictures by patch quality; no reference model).
    config.objective = "focus_dpo"
    # What is trained: "adapter" (subject adapter and the image keys and values of the UNet),
    # "lora" (low-rank updates of the UNet's attention; set model.lora_rank) or "full" (UNet and
    # adapter).
    config.trainable = "adapter"
    # Pull towards the reference model: the smaller, the further the policy may go.
    config.beta = 100.0
    # Weight of the chosen picture's plain denoising error beside the preference (focus/losses.py);
    # 0 leaves FocusDPO as it is in the paper.
    config.anchor = 1.0
    # Whether the anchor fades with the slope of the preference loss (focus/losses.py).
    config.anchor_fades = False
    # Chances that a pair loses its caption, its references, and both: what guidance's unconditional
    # branch learns from. Chosen and rejected image, policy and reference model lose the same.
    config.condition_dropout = (0.0, 0.0, 0.0)
    # For "sft" and "subject_sft" alone: chance to learn from the rejected picture of a pair and not
    # from the chosen one; mean and deviation of a logit-normal draw of timesteps, where () draws
    # them uniformly.
    config.rejected_share = 0.0
    config.timestep_logits = ()

    # Optimiser steps, and pairs a step over all devices.
    config.steps = 80
    config.batch_size = 16
    # Batches whose gradients are averaged into one step; with as many as there are buckets, every
    # step sees every bucket once.
    config.accumulate = 1
    # "adamw", or "muon" for matrices and AdamW for the rest: half the optimiser's memory. Its updates are of
    # AdamW's size, so that the same learning rates serve.
    config.optimizer = "adamw"
    # Learning rate after a linear warm-up, then "constant", a "cosine" decay to zero, or "wsd": constant, and
    # linear to zero over the last fifth of the steps.
    config.learning_rate = 1.5e-3
    config.warmup_steps = 10
    config.decay = "cosine"
    config.weight_decay = 0.0
    config.adam_b2 = 0.99
    # Largest norm of the gradient.
    config.gradient_clip = 1.0
    # Moving average of the trained parameters, kept in their place; 0 keeps none.
    config.ema_decay = 0.0

    # After how many steps to log, to save and to draw samples; 0, or more than there are, is never on
    # the way. The last step is always logged and saved, and its samples drawn (evaluation.pictures = 0
    # draws none). Every saved step is logged. How many checkpoints to keep.
    config.log_every = 10
    config.checkpoint_every = 20
    config.keep_checkpoints = 2
    config.sample_every = 40

    # How the devices are divided; -1 takes what the others leave. "data" divides a batch; "fsdp"
    # divides it and the parameters; "tensor" divides the inside of layers.
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.model = ml_collections.ConfigDict()
    # The model to start from: "toybox", which ships with the package, a folder such as
    # runs/toybox_base_generator/model, or SDXL in the layouts of configs/sdxl_dpo.py.
    config.model.pretrained = "toybox"
    # Files of SDXL that lie elsewhere; see there.
    config.model.adapter = ""
    config.model.image_encoder = ""
    config.model.tokenizer = ""
    config.model.prediction_type = ""
    # Rank of the low-rank updates to add; 0 adds none. Those that the model above has stay.
    config.model.lora_rank = 0
    # Alpha of the low-rank updates: they are scaled by alpha / rank, and so is the effect of a learning rate.
    # 0 takes that of the updates which the model has, or 16 for new ones.
    config.model.lora_alpha = 0.0
    # Whether to compute parts of the UNet again in the backward pass instead of keeping them.
    config.model.remat = False
    # Run equal transformer blocks in a loop: compiles faster, and on a CPU runs as fast.
    config.model.scan_layers = True

    config.data = ml_collections.ConfigDict()
    # "toybox", rendered and built once, or "prepared": your own pictures, from the folder that
    # focusdpo_jax.prepare left (docs/data.md). But for path and cache the other fields are
    # Toybox's.
    config.data.source = "toybox"
    # Folder under which Toybox is built, once for each seed and size; or the prepared folder.
    config.data.path = "data"
    config.data.seed = 0
    config.data.train_size = 768
    # Validation scenes are drawn in the pictures; test scenes are measured.
    config.data.validation_size = 16
    config.data.test_size = 896
    # Chance of a scene with one, two, three subjects.
    config.data.subject_counts = (0.2, 0.4, 0.4)
    # Chance that a disrupted subject of a rejected picture wears looks of another of its scene.
    config.data.leak_probability = 1.0
    # How the scenes look: the largest radius of subjects by their number, in pixels of 64, and how wide
    # patterns are.
    config.data.subject_radii = (14.0, 13.0, 11.5)
    config.data.pattern_scale = 1.0
    # Chance of two subjects of one class in a scene of several; that a disrupted subject differs in one
    # look alone; and that a rejected image has a trace of inpainting over all of its prior mask.
    config.data.same_class_probability = 0.0
    config.data.one_look_probability = 0.0
    config.data.nuisance_probability = 0.0
    # The prior mask: "exact", "dilated", or the "box" around each disrupted subject.
    config.data.prior_mask = "exact"
    # Chance that a subject of a scene with less than three has a second reference.
    config.data.second_reference_probability = 0.0
    # Whether the frozen encoders see every picture once, before training, and not in every step.
    # The result is kept under the path above.
    config.data.cache = True
    # Processes that read and decode; 0 does it by threads of the one that trains.
    config.data.workers = 0

    # FocusDPO's weight (focus/weighting.py) and the buckets of timesteps in which it moves.
    config.focus = ml_collections.ConfigDict()
    config.focus.buckets = 4
    # What SPAF compares with the references: "vit" (the image encoder's features of the clean
    # pictures), "unet" (those of the reference model at the step's noise; needs data.cache) or
    # "attention" (its cross-attention to the image tokens).
    config.focus.features = "vit"
    # How many features stand for a subject, and as many for what surrounds it in its reference
    # (with "attention" it is the image tokens that do).
    config.focus.prototypes = 16
    # Whether a match counts only on its own subject, and not where another reference explains a subject.
    config.focus.own_subject = False
    # SPAF: match the picture's patches with the references. DPCE: let detailed patches weigh more.
    config.focus.spaf = True
    config.focus.dpce = True
    # Share of a subject's area that may match, at the noisy and at the clean end.
    config.focus.rho_noisy = 0.3
    config.focus.rho_clean = 0.9
    # Extra weight of what does not match its reference yet, and of detail.
    config.focus.lambda_s = 1.0
    config.focus.lambda_d = 1.0
    # Extra weight of where the reference model is unsure, by its own error (focus/confidence.py); 0 is off.
    config.focus.lambda_c = 0.0
    # Alignment score from which detail counts; width of the gate (0: open or shut).
    config.focus.tau = 0.5
    config.focus.gate_width = 0.0
    # Weight outside the mask, where both images are equal: it divides beta.
    config.focus.background = 0.5
    # Weight of what matches already, while the gate is shut.
    config.focus.matched = 0.5
    # Share of the denoising path, from the clean end, in which detail exists at all.
    config.focus.detail_fraction = 0.5
    # DPCE's entropy: bins of luminance, and width of its Gaussian window in pixels.
    config.focus.detail_bins = 16
    config.focus.detail_sigma = 3.0

    # How pictures are drawn: DDIM steps and guidance scale; 1 or less is none, at
    # half the cost.
    config.sampling = ml_collections.ConfigDict({"steps": 8, "guidance": 1.0})
    # Test scenes measured before and after, scenes drawn at once, scenes shown (0: none), and
    # validation scenes measured whenever pictures are drawn (0: none): a learning curve in metrics.jsonl.
    config.evaluation = ml_collections.ConfigDict(
        {"scenes": 896, "batch_size": 32, "pictures": 8, "validation_scenes": 0}
    )
    return config
