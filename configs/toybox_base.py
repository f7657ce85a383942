"""Makes the small generator that ships with the package, in five stages; see docs/toybox.md.

    python -m focusdpo_jax.main --config=configs/toybox_base.py:autoencoder
    python -m focusdpo_jax.main --config=configs/toybox_base.py:image_encoder
    python -m focusdpo_jax.main --config=configs/toybox_base.py:probe
    python -m focusdpo_jax.main --config=configs/toybox_base.py:generator
    python -m focusdpo_jax.main --config=configs/toybox_base.py:confusion

Each stage starts from the model folder that the one before it left in `runs/`.
"""

import ml_collections

STAGES = ("autoencoder", "image_encoder", "probe", "generator", "confusion")


def get_config(stage="generator"):
    """The configuration of one stage."""
    if stage not in STAGES:
        raise ValueError(f"toybox_base has the stages {', '.join(STAGES)}, not {stage!r}")
    generates = stage in ("generator", "confusion")
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Side of the pictures in pixels.
    config.resolution = 64
    # Type of the computation, and of what is not trained: "float32" or "bfloat16".
    config.dtype = "float32"

    # What is learnt: "autoencode", "attributes" (image encoder), "probe", or "subject_sft",
    # the denoising error of the chosen pictures, where subjects count more than background.
    config.objective = {
        "autoencoder": "autoencode",
        "image_encoder": "attributes",
        "probe": "probe",
    }.get(stage, "subject_sft")
    # For "subject_sft": UNet, subject adapter and both text encoders; at last the subject adapter
    # and the image keys and values of the UNet alone.
    config.trainable = "adapter" if stage == "confusion" else "generator"
    # Chances to drop the caption, the references, and both, for classifier-free guidance.
    config.condition_dropout = (0.07,) * 3 if generates else (0.0,) * 3
    # Chance that a scene is learnt from its rejected picture, in which some subjects are not those
    # of the references. The last stage learns from nothing else: it gives the generator the fault
    # that preference training is there to mend, as large ones have it from unfiltered data.
    config.rejected_share = 1.0 if stage == "confusion" else 0.0
    # Mean and deviation of a logit-normal draw of timesteps; () draws them uniformly. Shape
    # and look of a subject are decided somewhat above the middle, where it as a whole outweighs
    # the noise.
    config.timestep_logits = (0.6, 1.0) if generates else ()
    # Not used here; only preference objectives have a reference model to stay close to.
    config.beta = 1.0
    config.anchor = 0.0
    config.anchor_fades = False

    # Optimiser steps and scenes a step.
    config.steps = {
        "autoencoder": 5000,
        "image_encoder": 1500,
        "probe": 2500,
        "generator": 20000,
        "confusion": 500,
    }[stage]
    config.batch_size = {"autoencoder": 24, "image_encoder": 16, "probe": 16}.get(stage, 32)
    # Batches whose gradients are averaged into one step.
    config.accumulate = 1
    # "adamw", or "muon" for matrices and AdamW for the rest.
    config.optimizer = "adamw" if stage == "confusion" else "muon"
    # Peak learning rate after the warm-up, then a "cosine" decay to zero, or "wsd": constant, and linear to
    # zero over the last fifth of the steps, so that a run can still be given more of them before.
    config.learning_rate = {"generator": 6e-3, "confusion": 2e-3}.get(stage, 1e-2)
    config.warmup_steps = 100
    config.decay = "wsd" if stage == "generator" else "cosine"
    config.weight_decay = 1e-4
    config.adam_b2 = 0.99
    # Largest norm of the gradient.
    config.gradient_clip = 1.0
    # Moving average of the parameters, which is what is kept.
    config.ema_decay = 0.999 if stage == "generator" else 0.995

    # After how many steps to log, to save and to draw samples; 0, or more than there are, is never on
    # the way. The last step is always logged and saved, and its samples drawn (evaluation.pictures = 0
    # draws none). Every saved step is logged. How many checkpoints to keep.
    config.log_every = 50
    config.checkpoint_every = 200
    config.keep_checkpoints = 2
    config.sample_every = 1000

    # How the devices are divided; -1 takes what the others leave. "data" divides a batch; "fsdp"
    # divides it and the parameters; "tensor" divides the inside of layers.
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.model = ml_collections.ConfigDict()
    # Folder of the model to start from; empty makes one of `sizes` at random.
    config.model.pretrained = {
        "autoencoder": "",
        "image_encoder": "runs/toybox_base_autoencoder/model",
        "probe": "runs/toybox_base_image_encoder/model",
        "generator": "runs/toybox_base_probe/model",
        "confusion": "runs/toybox_base_generator/model",
    }[stage]
    # Of published models alone; see configs/sdxl_dpo.py.
    config.model.adapter = ""
    config.model.image_encoder = ""
    config.model.tokenizer = ""
    config.model.prediction_type = ""
    config.model.lora_rank = 0
    # Alpha of the low-rank updates: they are scaled by alpha / rank, and so is the effect of a learning rate.
    # 0 takes that of the updates which the model has, or 16 for new ones.
    config.model.lora_alpha = 0.0
    config.model.remat = False
    # Run equal transformer blocks in a loop: compiles faster, and on a CPU runs as fast.
    config.model.scan_layers = True
    if stage == "autoencoder":
        config.model.sizes = sizes()

    config.data = ml_collections.ConfigDict()
    # These objectives learn what Toybox knows of its pictures; "generator" may take "prepared" too.
    config.data.source = "toybox"
    # Folder under which the data set is built.
    config.data.path = "data"
    config.data.seed = 7
    config.data.train_size = 12000
    config.data.validation_size = 128
    config.data.test_size = 256
    # Chance of a scene with one, two, three subjects.
    config.data.subject_counts = (0.2, 0.4, 0.4)
    # Chance that a disrupted subject of a rejected picture wears looks of another of its scene.
    config.data.leak_probability = 1.0 if stage == "confusion" else 0.5
    # How the scenes look: the largest radius of subjects by their number, in pixels of 64, and how wide
    # patterns are.
    config.data.subject_radii = (21.0, 17.0, 14.5)
    config.data.pattern_scale = 1.1
    # Chance of two subjects of one class in a scene of several; that a disrupted subject differs in one
    # look alone; and that a rejected image has a trace of inpainting over all of its prior mask.
    config.data.same_class_probability = 0.1
    config.data.one_look_probability = 0.0
    config.data.nuisance_probability = 0.0
    # The prior mask: "exact", "dilated", or the "box" around each disrupted subject.
    config.data.prior_mask = "exact"
    # Chance that a subject of a scene with less than three has a second reference.
    config.data.second_reference_probability = 0.0
    # Whether frozen encoders see every picture once, before training, and not in every step.
    config.data.cache = True
    # Processes that read and decode; 0 does it by threads of the one that trains.
    config.data.workers = 0

    # The weight of the background for "subject_sft"; FocusDPO's other numbers are not used here,
    # see configs/toybox_dpo.py.
    config.focus = ml_collections.ConfigDict(
        {
            "buckets": 1,
            "features": "vit",
            "prototypes": 1,
            "own_subject": False,
            "spaf": False,
            "dpce": False,
            "rho_noisy": 0.3,
            "rho_clean": 0.9,
            "lambda_s": 1.0,
            "lambda_d": 1.0,
            "lambda_c": 0.0,
            "tau": 0.5,
            "gate_width": 0.0,
            "background": 0.25,
            "matched": 0.5,
            "detail_fraction": 0.5,
            "detail_bins": 16,
            "detail_sigma": 3.0,
        }
    )

    # Pictures drawn on the way: DDIM steps and guidance scale; 1 or less is none.
    config.sampling = ml_collections.ConfigDict({"steps": 16, "guidance": 2.0})
    # Test scenes measured at the end, scenes drawn at once, scenes shown in pictures, and validation
    # scenes measured whenever pictures are drawn: the learning curve in metrics.jsonl.
    config.evaluation = ml_collections.ConfigDict(
        {"scenes": 256, "batch_size": 32, "pictures": 8, "validation_scenes": 128}
    )
    return config


def sizes():
    """SDXL's anatomy at a thousandth of its size: images of 64 x 64, latents of 16 x 16 x 16."""
    text = {
        "vocab_size": 573,
        "max_length": 16,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 128,
        "eos_token_id": 572,
    }
    return ml_collections.ConfigDict(
        {
            "vae": {
                "block_out_channels": (8, 32, 64),
                "layers_per_block": 1,
                "latent_channels": 16,
                "norm_groups": 8,
                "scaling_factor": 1.0,
            },
            "text_encoder": {**text, "activation": "quick_gelu", "projection_dim": None},
            "text_encoder_2": {**text, "activation": "gelu", "projection_dim": 64},
            "image_encoder": {
                "image_size": 64,
                "patch_size": 4,
                "hidden_size": 64,
                "num_layers": 4,
                "num_heads": 4,
                "intermediate_size": 256,
                "activation": "gelu",
                "projection_dim": 64,
            },
            "adapter": {
                "kind": "resampler",
                "input_dim": 64,
                "output_dim": 128,
                "num_tokens": 8,
                "width": 64,
                "depth": 2,
                "num_heads": 4,
                "head_dim": 16,
                "expansion": 4,
                "dropped": "absent",
            },
            "unet": {
                "in_channels": 16,
                "out_channels": 16,
                "block_out_channels": (48, 96),
                "transformer_layers_per_block": (0, 2),
                "mid_transformer_layers": 2,
                "layers_per_block": 1,
                "num_heads": (2, 4),
                "cross_attention_dim": 128,
                "addition_time_embed_dim": 16,
                "pooled_dim": 64,
                "norm_groups": 8,
                "image_context": True,
            },
            "prediction_type": "v_prediction",
            "zero_terminal_snr": True,
        }
    )
