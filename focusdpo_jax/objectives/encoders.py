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


AUTOENCODE = register(
    EncoderObjective(
        name="autoencode",
        title="autoencoder",
        exports=("vae",),
        parameters=_autoencoder_parameters,
        make_loss=lambda generator: _pretraining().autoencoder_loss(generator),
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
        make_loss=lambda generator: _pretraining().image_encoder_loss(generator),
    )
)

PROBE = register(
    EncoderObjective(
        name="probe",
        title="probe of Toybox's attributes",
        exports=(),
        parameters=_probe_parameters,
        make_loss=lambda generator: _pretraining().probe_loss(generator),
    )
)
