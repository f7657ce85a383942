"""PyTorch's side of `step.py`: the same step with diffusers' UNet and IP-Adapter.

step_diffusers.py CASE FOLDER eager|regional|compiled DTYPE REMAT
"""

import copy
import json
import pathlib
import sys
import time
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models import embeddings
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from safetensors.torch import load_file
from step import peak_memory, reset_peak_memory, serve


class Passthrough(torch.nn.Module):
    """Replaces the UNet's image projection, since the adapter runs outside of the UNet."""

    def forward(self, tokens):
        """Returns the tokens unchanged."""
        return tokens


def load_unet(sizes: Any, folder: pathlib.Path):
    """Loads diffusers' UNet with IP-Adapter's attention."""
    depths = sizes["transformer_layers_per_block"]
    # Copies are aligned in memory, which the tensors of a mapped file need not be.
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "unet.safetensors").items()
    }
    with torch.device("meta"):  # Random initialisation would take a minute.
        model = _unet(sizes, depths, tensors)
    model.load_state_dict(tensors, assign=True)
    return model


def _unet(sizes, depths, tensors):
    """Creates the module; attention has an image branch where `tensors` have one."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    unet: Any = diffusers.UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    model = unet(
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        down_block_types=down,
        up_block_types=[n.replace("Down", "Up") for n in reversed(down)],
        block_out_channels=sizes["block_out_channels"],
        layers_per_block=sizes["layers_per_block"],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=sizes["num_heads"],
        cross_attention_dim=sizes["cross_attention_dim"],
        norm_num_groups=sizes["norm_groups"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes["addition_time_embed_dim"],
        projection_class_embeddings_input_dim=(
            sizes["pooled_dim"] + 6 * sizes["addition_time_embed_dim"]
        ),
    )
    processors = {}
    for name in model.attn_processors:
        key = tensors.get(f"{name}.to_k_ip.0.weight")
        processors[name] = (
            AttnProcessor2_0()
            if key is None
            else IPAdapterAttnProcessor2_0(key.shape[0], key.shape[1], scale=1.0)
        )
    model.set_attn_processor(processors)
    model.encoder_hid_proj = Passthrough()
    model.config.encoder_hid_dim_type = "ip_image_proj"
    return model


def load_adapter(sizes: Any, folder: pathlib.Path):
    """Loads diffusers' resampler."""
    model = embeddings.IPAdapterPlusImageProjection(
        embed_dims=sizes["input_dim"],
        output_dims=sizes["output_dim"],
        hidden_dims=sizes["width"],
        depth=sizes["depth"],
        dim_head=sizes["head_dim"],
        heads=sizes["num_heads"],
        num_queries=sizes["num_tokens"],
        ffn_ratio=sizes["expansion"],
    )
    model.load_state_dict(load_file(folder / "adapter.safetensors"))
    return model


def make(folder: pathlib.Path, mode, dtype: str, remat: bool, device):
    """Returns the function that runs the next step."""
    settings = json.loads((folder / "sizes.json").read_text())
    torch_dtype = getattr(torch, dtype)
    unet, adapter = load_unet(settings["unet"], folder), load_adapter(settings["adapter"], folder)
    unet.requires_grad_(False)
    trainable = [*adapter.parameters()]
    for name, parameter in unet.named_parameters():
        if "_ip." in name:
            parameter.requires_grad_(True)
            trainable.append(parameter)
        elif parameter.ndim > 1:
            parameter.data = parameter.data.to(torch_dtype)
    unet, adapter = unet.to(device), adapter.to(device)
    if remat:
        unet.enable_gradient_checkpointing()
    # The reference has a copy of the trained parameters and shares the frozen ones.
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad}
    reference = copy.deepcopy(unet, shared).requires_grad_(False)
    reference_adapter = copy.deepcopy(adapter).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings["learning_rate"],
        betas=(0.9, settings["adam_b2"]),
        eps=1e-8,
        weight_decay=settings["weight_decay"],
    )
    conditioning = {
        name: torch.from_numpy(value).to(device)
        for name, value in np.load(folder / "conditioning.npz").items()
    }
    text, pooled, time_ids = (
        conditioning[name].repeat_interleave(2, 0) for name in ("text", "pooled", "time_ids")
    )
    features = conditioning["features"].flatten(0, 1)
    slots = conditioning["features"].shape[1]

    def predict(unet, adapter, latents, timesteps):
        with torch.autocast(device, torch_dtype, enabled=torch_dtype != torch.float32):
            tokens = adapter(features).unflatten(0, (-1, slots))
            return unet(
                latents,
                timesteps,
                text,
                added_cond_kwargs={
                    "text_embeds": pooled,
                    "time_ids": time_ids,
                    "image_embeds": [tokens.repeat_interleave(2, 0)],
                },
            ).sample.float()

    def errors(model, adapter, latents, timesteps, target):
        return (target - predict(model, adapter, latents, timesteps)).square().mean((1, 2, 3))

    def loss_of(latents, timesteps, target):
        with torch.no_grad():
            reference_errors = errors(reference, reference_adapter, latents, timesteps, target)
        difference = errors(unet, adapter, latents, timesteps, target) - reference_errors
        chosen, rejected = difference[::2], difference[1::2]
        return torch.nn.functional.softplus(0.5 * settings["beta"] * (chosen - rejected)).mean()

    if mode == "compiled":
        loss_of = torch.compile(loss_of)
    elif mode == "regional":
        for model in (unet, reference):
            model.compile_repeated_blocks(dynamic=False)
    index = 0

    def step():
        nonlocal index
        noisy = np.load(folder / f"noisy_{index}.npz")
        index += 1
        latents, target = (
            torch.from_numpy(np.moveaxis(noisy[name], -1, 1).copy()).to(device)
            for name in ("latents", "target")
        )
        timesteps = torch.from_numpy(noisy["timesteps"]).to(device)
        synchronize(device)
        start = time.perf_counter()
        loss = loss_of(latents, timesteps, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings["gradient_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        synchronize(device)
        return time.perf_counter() - start, value

    return step


def synchronize(device) -> None:
    """Waits until the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Answers the requests of `step.py`."""
    _, folder, mode, dtype, remat = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        memory, reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    else:
        memory, reset = peak_memory, reset_peak_memory
    serve(lambda: make(pathlib.Path(folder), mode, dtype, remat == "1", device), memory, reset)


if __name__ == "__main__":
    main()
