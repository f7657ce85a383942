r"""FocusDPO on SDXL with an IP-Adapter; docs/sdxl.md goes through it from download to diffusers.

    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py --config.model.pretrained=DIR
    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py:lora --config.model.pretrained=DIR
    python -m focusdpo_jax.main --config=configs/sdxl_dpo.py:debug

Without an argument it trains the adapter, with `:lora` low-rank updates, with `:full` UNet and
adapter. `:debug` needs no files: SDXL's anatomy with small random weights, minutes on a laptop.

The numbers of training are starting points from the literature, not measured here at this size.
"""

import ml_collections

ARGUMENTS = ("", "lora", "full", "debug")


def get_config(argument=""):
    """The configuration; every field can be set on the command line as --config.FIELD=VALUE."""
    if argument not in ARGUMENTS:
        raise ValueError(
            f"sdxl_dpo takes {', '.join(filter(None, ARGUMENTS))} or nothing after "
            f"the colon, not {argument!r}"
        )
    debug = argument == "debug"
    config = ml_collections.ConfigDict()
    # Every random draw of a run derives from it.
    config.seed = 0
    # Side of the images in pixels, a multiple of 8 (of what a latent covers).
    config.resolution = 64 if debug else 1024
    # Type of the computation, and of what is not trained: "float32" or "bfloat16". What is
    # trained, losses, norms, softmax and noise schedules are float32 in both.
    config.dtype = "bfloat16"

    # "focus_dpo", or one of its rivals over the same step: "dpo" (Diffusion-DPO: every location
    # counts the same), "prior_dpo" (the mask of where the pair differs alone), "sft" (the
    # denoising error of the chosen picture; no reference model), "subject_sft" (the same with
    # subjects weighing more than background), "patch_dpo" (PatchDPO: the denoising error of both
    # pictures by patch quality; no reference model).
    config.objective = "focus_dpo"
    # What is trained: "adapter" (IP-Adapter: resampler, image keys and values of the UNet; about
    # 0.4 billion parameters), "lora" (low-rank updates of the UNet's attention) or "full" (UNet and
    # adapter, 3 billion: 16 bytes each with gradient and optimiser). A random UNet lets no gradient
    # through to an adapter, so debugging trains all.
    config.trainable = {"": "adapter", "debug": "full"}.get(argument, argument)
    # Pull towards the reference model. Diffusion-DPO's value for SDXL, where every location counts the
    # same. "focus_dpo" and "prior_dpo" leave out the background, which makes the same beta 2 to 3 times as
    # strong; the log's logit scale shows it (docs/method.md).
    config.beta = 5000.0
    # Weight of the chosen picture's plain denoising error beside the preference (focus/losses.py);
    # 0 leaves FocusDPO as it is in the paper.
    config.anchor = 0.0
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

    # Optimiser steps, and pairs a batch over all devices. A pair is two pictures at the policy and
    # two at the reference model. 8 are meant for one GPU of 80 GB; give 8 for each chip with as
    # much, for example 128 on a v5p-32 slice (16 chips), and accumulate = 1.
    config.steps = 6 if debug else 2000
    config.batch_size = {"full": 4, "debug": 4}.get(argument, 8)
    # Batches whose gradients are averaged into one step; with as many as there are buckets, every
    # step sees every bucket once. It keeps a sum of the size of the gradient.
    config.accumulate = {"full": 1, "debug": 1}.get(argument, 4)
    # "adamw", or "muon" for matrices and AdamW for the rest: half the optimiser's memory. Its updates are of
    # AdamW's size, so that the same learning rates serve.
    config.optimizer = "adamw"
    # Learning rate after a linear warm-up, then "constant", a "cosine" decay to zero, or "wsd": constant, and
    # linear to zero over the last fifth of the steps.
    config.learning_rate = {"lora": 1e-5, "full": 1e-6, "debug": 1e-3}.get(argument, 1e-5)
    config.warmup_steps = 1 if debug else 200
    config.decay = "constant"
    config.weight_decay = 0.0 if debug else 1e-2
    config.adam_b2 = 0.999
    # Largest norm of the gradient.
    config.gradient_clip = 1.0
    # Moving average of the trained parameters, kept in their place; 0 keeps none.
    config.ema_decay = 0.0

    # After how many steps to log, to save and to draw samples; 0, or more than there are, is never on
    # the way. The last step is always logged and saved, and its samples drawn (evaluation.pictures = 0
    # draws none). Every saved step is logged. How many checkpoints to keep.
    config.log_every = 1 if debug else 10
    config.checkpoint_every = 3 if debug else 100
    config.keep_checkpoints = 2
    config.sample_every = 3 if debug else 250

    # How the devices are divided; -1 takes what the others leave. "data" divides a batch; "fsdp"
    # divides it and the parameters, which are gathered layer by layer; "tensor" divides the inside
    # of layers. docs/scaling.md says when to choose which.
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.model = ml_collections.ConfigDict()
    # The model to start from: a folder of diffusers' layout, or its hub id where it was fetched
    # before (nothing is downloaded); a single safetensors file of SDXL's original layout; a model
    # folder that a run left. Empty makes one of `sizes` at random.
    config.model.pretrained = "" if debug else "stabilityai/stable-diffusion-xl-base-1.0"
    # IP-Adapter file, such as h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors; as
    # above a path or what was fetched from the hub. Empty: ip_adapter.safetensors of the folder. Where it
    # has none, "sft" starts with a new adapter, and preference objectives are refused.
    config.model.adapter = ""
    # Folder of the image encoder that the adapter reads, such as
    # h94/IP-Adapter/models/image_encoder. Empty: image_encoder/ of the folder.
    config.model.image_encoder = ""
    # Folder of vocab.json and merges.txt, or tokenizer.json, for a single file, which has none. Empty:
    # tokenizer/ of the folder.
    config.model.tokenizer = ""
    # What the UNet predicts, where its files do not state it or state something else: epsilon,
    # v_prediction, or v_prediction_zero_snr, with noise of zero terminal SNR. Empty: what the files
    # say (scheduler_config.json; in a single file the metadata and the tensors v_pred and ztsnr).
    config.model.prediction_type = ""
    # Rank of the low-rank updates; 0 leaves them out.
    config.model.lora_rank = 32 if argument == "lora" else 0
    # Alpha of the low-rank updates: they are scaled by alpha / rank, and so is the effect of a learning rate.
    # 0 takes that of the updates which the model has, or 16 for new ones.
    config.model.lora_alpha = 0.0
    # Compute resnets and transformer blocks of the UNet again in the backward pass and keep only
    # what goes into each: a third more work, several times less memory.
    config.model.remat = True
    # Run equal transformer blocks in a loop over stacked parameters. It compiles several times as fast,
    # which suits debugging; a step then takes about twice as long on a TPU (docs/performance.md).
    config.model.scan_layers = debug
    if debug:
        config.model.sizes = sizes()

    config.data = ml_collections.ConfigDict()
    # "toybox", rendered here, which tries the machinery and teaches SDXL nothing; or "prepared":
    # `path` is then the folder of a data set of your own pictures.
    config.data.source = "toybox"
    # Folder under which Toybox is built, once for each seed and size; or that of the data set.
    config.data.path = "data"
    # Of Toybox alone, as are the sizes and the chance of a scene with one, two, three subjects. Of
    # a prepared data set the last one says how many subjects a pair can have.
    config.data.seed = 0
    config.data.train_size = 32 if debug else 256
    config.data.validation_size = 4 if debug else 16
    config.data.test_size = 4 if debug else 16
    config.data.subject_counts = (0.2, 0.4, 0.4)
    # Chance that a disrupted subject of a rejected picture wears looks of another of its scene.
    config.data.leak_probability = 0.5
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
    # The result is kept on disk under the path above, or in memory for supervised objectives on
    # Toybox: 3.4 MiB a pair at 1024 pixels. Encoders then take no memory while there is nothing to draw.
    config.data.cache = debug
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
    config.focus.prototypes = 32
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
    # DPCE's entropy: bins of luminance, and width of its Gaussian window in pixels (a latent's 8).
    config.focus.detail_bins = 16
    config.focus.detail_sigma = 8.0

    # How pictures are drawn: DDIM steps and guidance scale; 1 or less is none.
    config.sampling = ml_collections.ConfigDict({"steps": 4 if debug else 30, "guidance": 5.0})
    # Test scenes measured before and after (none: only Toybox's own models have the probe for it),
    # scenes drawn and pairs encoded at once, scenes shown in pictures (0: none), and validation scenes
    # measured whenever pictures are drawn (0: none; Toybox's own models alone).
    config.evaluation = ml_collections.ConfigDict(
        {"scenes": 0, "batch_size": 4, "pictures": 4, "validation_scenes": 0}
    )
    return config


def sizes():
    """SDXL's anatomy, small: three levels, transformers of depth 0, 1 and 2, two text encoders."""
    text = {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 64,
        "eos_token_id": 572,
    }
    return ml_collections.ConfigDict(
        {
            "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_groups": 8},
            "text_encoder": {**text, "activation": "quick_gelu", "projection_dim": None},
            "text_encoder_2": {**text, "activation": "gelu", "projection_dim": 32},
            "image_encoder": {
                "image_size": 32,
                "patch_size": 4,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "projection_dim": 32,
            },
            "adapter": {
                "input_dim": 32,
                "output_dim": 64,
                "num_tokens": 4,
                "width": 32,
                "depth": 4,
                "num_heads": 1,
            },
            "unet": {
                "block_out_channels": (16, 32, 32),
                "transformer_layers_per_block": (0, 1, 2),
                "mid_transformer_layers": 2,
                "num_heads": (1, 2, 2),
                "cross_attention_dim": 64,
                "addition_time_embed_dim": 16,
                "pooled_dim": 32,
                "norm_groups": 8,
                "image_context": True,
            },
        }
    )
