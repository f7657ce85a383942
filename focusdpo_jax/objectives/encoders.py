"""Objectives that train Toybox's autoencoder, image encoder and probe (`toybox.pretraining`)."""

from focusdpo_jax.objectives.base import EncoderObjective, register


def _pretraining():
    # Imported here, since it imports networks that other objectives do not need.
    from focusdpo_jax.toybox import pretraining

    return pretraining


def _autoencoder_parameters(model, key):
    del key
    return {"vae": model.parameters["vae"]}, {}


def _image_encoder_parameters(model, key):
    heads = _pretraining().init_heads(model.generator, key)
    trainable = {"image_encoder": model.parameters["image_encoder"], "heads": heads}
    return trainable, {"vae": model.parameters["vae"]}


def _probe_parameters(model, key):
    return {"probe": _pretraining().init_probe(key)}, {"vae": model.parameters["vae"]}


def _generated_probe_parameters(model, key):
    """Continues with the model's probe, if it has one."""
    probe = _pretraining().init_probe(key) if model.probe is None else model.probe
    return {"probe": probe}, model.parameters


AUTOENCODE = register(
    EncoderObjective(
        name="autoencode",
        title="autoencoder",
        exports=("vae",),
        parameters=_autoencoder_parameters,
        make_loss=lambda model: _pretraining().autoencoder_loss(model.generator),
        finish=lambda model, trained, images: _pretraining().with_latent_scale(
            model, model.parameters | trained, images()
        ),
    )
)

ATTRIBUTES = register(
    EncoderObjective(
        name="attributes",
        title="image encoder",
        exports=("image_encoder",),
        parameters=_image_encoder_parameters,
        make_loss=lambda model: _pretraining().image_encoder_loss(model.generator),
    )
)

PROBE = register(
    EncoderObjective(
        name="probe",
        title="probe of Toybox's attributes",
        exports=(),
        parameters=_probe_parameters,
        make_loss=lambda model: _pretraining().probe_loss(model.generator),
    )
)

GENERATED_PROBE = register(
    EncoderObjective(
        name="generated_probe",
        title="probe of Toybox's attributes, on generated images too",
        exports=(),
        parameters=_generated_probe_parameters,
        make_loss=lambda model: _pretraining().generated_probe_loss(
            model.generator, model.tokenizer("")
        ),
    )
)
