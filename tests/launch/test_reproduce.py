"""launch/reproduce.sh: what it checks and prints; and the whole study, of tiny models."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from tests.launch.stand_ins import ROOT, assert_fails, calls, launch, venv

# Subjects and their classes; the first two are trained on.
SUBJECTS = {"boat": "boat", "boat2": "boat", "cup": "cup", "cup2": "cup", "cat": "cat"}
SINGLE = [("a red boat", "cup"), ("a cup", "cup"), ("a cup", "cup2"), ("a boat", "boat")]
MULTI = [
    ("a cup and a cup", "cup", "cup2"),
    ("a red cup and a cat", "cup2", "cat"),
    ("a", "boat", "cat"),
]


def photographs(folder):
    """DreamBench's layout: two photographs of every subject, a disc in its colour, and masks."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :48]
    for subject in SUBJECTS:
        color = draw.integers(0, 256, 3)
        for i in range(2):
            small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8))
            picture = np.array(small.resize((48, 48), Image.Resampling.BICUBIC))
            mask = (rows - 24) ** 2 + (columns - 22 - 4 * i) ** 2 < 180
            picture[mask] = color
            path = folder / subject / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            Image.fromarray(mask).save(path.with_name(f"{i:02d}_mask.png"))
    listed = "".join(f"{subject},{kind}\n" for subject, kind in SUBJECTS.items())
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{listed}")


def lists(folder):
    """UNO's layout."""
    folder.mkdir(parents=True)
    for name, scenes in (("singleip", SINGLE), ("multiip", MULTI)):
        entries = [
            {
                "prompt": prompt,
                "image_paths": [f"./dreambooth/dataset/{s}/00.jpg" for s in subjects],
            }
            for prompt, *subjects in scenes
        ]
        (folder / f"dreambench_{name}.json").write_text(json.dumps(entries))


def environment(folder, **variables):
    """Variables of a study in `folder`."""
    return {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "TOPOLOGY": "none",
        "FREE_GB": "1",
        "OUTPUT": str(folder / "my study"),
        "DREAMBENCH": str(folder / "dreambooth/dataset"),
        "LISTS": str(folder / "lists"),
        "TRAIN_SUBJECTS": "boat boat2",
        **variables,
    }


def weights(folder):
    """Tiny models of random weights in their publishers' layouts; returns the variables."""
    import dataclasses

    import transformers

    from focusdpo_jax.checkpoints import diffusers_folder, ip_adapter, tensor_file
    from focusdpo_jax.models.tokenizer import write_vocabulary
    from tests.models.weights import random_tree
    from tests.parity import oracles, pipeline, test_measures, test_sdxl_run, test_unet
    from tests.parity.test_diffusers_folder import examples

    for name, channels in (("sdxl", 4), ("inpainting", 9)):
        parts = pipeline.parts(write_vocabulary(folder / "scratch", pipeline.WORDS))
        small = dataclasses.replace(test_unet.SMALL, in_channels=channels)
        pipeline.save(folder / name, parts | {"unet": test_unet.peer(small)})
    config = diffusers_folder.load_config(folder / "sdxl")
    shapes = examples(dataclasses.replace(config, adapter=test_sdxl_run.ADAPTER))
    tensor_file.write(
        folder / "plus.safetensors",
        ip_adapter.from_flax(random_tree(shapes["unet"]), random_tree(shapes["adapter"])),
    )
    shutil.move(folder / "sdxl/image_encoder", folder / "image_encoder")
    sizes = test_measures.SIZES | {"image_size": 224, "patch_size": 16}
    oracles.randomised(
        transformers.ViTModel,
        transformers.ViTConfig(intermediate_size=40, **sizes),
        add_pooling_layer=False,
    ).save_pretrained(folder / "dino")
    oracles.randomised(
        transformers.Dinov2Model, transformers.Dinov2Config(mlp_ratio=2, **sizes)
    ).save_pretrained(folder / "dinov2")
    test_measures.small_clip(folder / "clip").save_pretrained(folder / "clip")
    paths = {"ADAPTER": "plus.safetensors"}
    for name in ("SDXL", "IMAGE_ENCODER", "INPAINTING", "DINO", "DINOV2", "CLIP"):
        paths[name] = name.lower()
    return {name: str(folder / path) for name, path in paths.items()}


def study(folder, **variables):
    """Variables of a study of seconds for each stage."""
    photographs(folder / "dreambooth/dataset")
    lists(folder / "lists")
    return environment(
        folder,
        **weights(folder / "weights"),
        RESOLUTION="32",
        STEPS="2",
        CONFIG_FLAGS="--config.batch_size=2 --config.accumulate=1 --config.checkpoint_every=1 "
        "--config.log_every=1 --config.warmup_steps=0 --config.sampling.steps=2 "
        "--config.evaluation.batch_size=2 --config.evaluation.pictures=1 --config.focus.buckets=1 "
        "--config.learning_rate=0.01",
        DISRUPT_FLAGS="--steps=2 --candidates=2",
        PREPARE_FLAGS="--workers=1",
        **variables,
    )


def quick(fake, **variables):
    """Variables of a study whose python only notes its words."""
    for name in ("SDXL", "IMAGE_ENCODER", "INPAINTING", "DINO", "DINOV2", "CLIP"):
        (fake / name.lower()).mkdir(exist_ok=True)
        variables.setdefault(name, name.lower())
    (fake / "plus.safetensors").touch()
    if not (fake / "lists").exists():
        photographs(fake / "dreambooth/dataset")
        lists(fake / "lists")
        venv(fake)
    python = {"PYTHON": "venv/bin/python", "ADAPTER": "plus.safetensors"}
    return environment(fake, **python | variables)


def stages(result):
    """[(name, whether it was done)] of what a start printed."""
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^# ([a-z][\w-]*)(: done)?$", result.stdout, re.M)
    return [(name, bool(done)) for name, done in found]


RUN = ["single", "multi", "one"]
ALL = [
    "split",
    *(f"evaluate-base-{kind}" for kind in RUN),
    "disrupt",
    "prepare",
    "train-dpo-0",
    "train-dpo-7",
    *(f"evaluate-dpo-{seed}-{kind}" for seed in (0, 7) for kind in RUN),
]


def test_a_dry_run_on_a_bare_machine(fake):
    """It names what is missing, prints every command, and runs none."""
    variables = {"FREE_GB": "1000000", "TOPOLOGY": "h100", "PYTHON": "nowhere/python"}
    result = launch(fake, "reproduce.sh", "--dry-run", PATH="/usr/bin:/bin", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert calls(fake) == [] and not (fake / "runs").exists()
    missing = "\n".join(re.findall("^# missing: (.*)$", result.stdout, re.M))
    assert f"PYTHON = {fake}/nowhere/python is missing: run launch/single_gpu.sh" in missing
    assert "hf is missing, which fetches SDXL" in missing
    assert "about 1000000 are needed" in missing
    output = f"{fake}/runs/reproduction"
    for part in (
        f"hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir {output}/weights/sdxl",
        f"git clone --depth 1 https://github.com/google/dreambooth {output}/weights/dreambooth",
        f"-m experiments.photograph_masks --photographs={output}/weights/dreambooth/dataset",
        f"-m focusdpo_jax.main --workdir={output}/runs/focus_dpo-0 --config=configs/sdxl_dpo.py",
        "-m focusdpo_jax.plan --topology=h100",
        "# no plan without PYTHON",
    ):
        assert part in result.stdout, part


def test_stages_that_are_done_are_skipped(fake):
    variables = quick(fake, OBJECTIVES="dpo", SEEDS="0 7", FLAGS_DPO="--config.beta=9")
    (fake / "my study/evaluations/base").mkdir(parents=True)
    for kind in ("single", "multi"):  # The stand-in writes nothing.
        for part in ("pictures", "scores"):
            (fake / "my study/evaluations/base" / kind / part).mkdir(parents=True)
    assert stages(launch(fake, "reproduce.sh", **variables)) == [
        *((name, False) for name in ALL),
        ("table", False),
    ]
    workdir = f"--workdir={fake}/my study/runs/dpo-7"
    [training, *evaluations] = [words for words in calls(fake) if workdir in words]
    assert training[1:3] == ["-m", "focusdpo_jax.main"] and len(evaluations) == 2
    assert training[-3:] == ["--config.objective=dpo", "--config.seed=7", "--config.beta=9"]
    assert stages(launch(fake, "reproduce.sh", **variables)) == [
        *((name, True) for name in ALL),
        ("table", False),
    ]
    # Other flags, and all that follows from them.
    variables["PREPARE_FLAGS"] = "--validation=0.1"
    again = ["prepare", "train-dpo-0", "train-dpo-7", *(n for n in ALL if "evaluate-dpo" in n)]
    assert stages(launch(fake, "reproduce.sh", "--dry-run", **variables))[:-1] == [
        (name, name not in again[:1]) for name in ALL
    ]
    assert stages(launch(fake, "reproduce.sh", **variables))[:-1] == [
        (name, name not in again) for name in ALL
    ]


def test_a_stage_that_fails_ends_the_script(fake):
    variables = quick(fake)
    python = fake / "venv/bin/python"
    python.write_text(python.read_text() + '[[ "$*" != *focusdpo_jax.prepare* ]] || exit 3\n')
    result = launch(fake, "reproduce.sh", "pairs", **variables)
    assert result.returncode == 3
    assert "stage prepare ended with status 3; run the same line again" in result.stderr
    assert sorted(os.listdir(fake / "my study/done")) == ["disrupt", "split"]


@pytest.mark.parametrize(
    "arguments, variables, parts",
    [
        (["training"], {}, ["training is no stage: give all, fetch"]),
        (["train", "evaluate"], {}, ["one stage at a time: evaluate"]),
        ([], {"CLIP": "no/clip"}, ["CLIP = {fake}/no/clip is missing"]),
        ([], {"SCENES": "s.jsonl"}, ["SCENES = {fake}/s.jsonl is missing"]),
        ([], {"SEEDS": " "}, ["SEEDS =  : give one or more"]),
        (
            ["train"],
            {"FREE_GB": "1000000"},
            ["my study: ", "GB are free, about 1000000 are needed"],
        ),
        ([], {"TRAIN_SUBJECTS": "boat teapot"}, ["dataset/teapot has no NN_mask.png"]),
        ([], {"PYTHON": "no/python", "DINO": "x"}, ["PYTHON = {fake}/no/python", "DINO = "]),
        (
            ["train"],
            {"PYTHON": sys.executable, "OBJECTIVES": "dpo", "FLAGS_DPO": "--config.betta=3"},
            ["dpo: error: ", "betta"],
        ),
    ],
)
def test_mistakes(fake, arguments, variables, parts):
    result = launch(fake, "reproduce.sh", *arguments, **quick(fake, **variables))
    assert_fails(result, *(part.format(fake=fake) for part in parts))
    assert not (fake / "my study").exists()


@pytest.mark.slow
def test_the_whole_study_at_a_small_size(tmp_path):
    """Two objectives, in minutes, from photographs to the table."""
    variables = study(tmp_path, OBJECTIVES="dpo focus_dpo", PYTHONPATH=str(ROOT))
    output = tmp_path / "my study"
    first = launch(tmp_path, "reproduce.sh", "base", **variables)
    assert [name for name, _ in stages(first)] == ALL[:4]
    result = launch(tmp_path, "reproduce.sh", timeout=3600, **variables)
    assert [name for name, done in stages(result) if done] == ALL[:4]
    names = ["base", "dpo", "focus_dpo", "IP-Adapter-Plus, published", "PatchDPO, published"]
    rows = result.stdout.splitlines()[-len(names) - 4 : -4]
    assert [row[: len(name)] for row, name in zip(rows, names)] == names
    assert "0.727  0.838  0.292" in re.sub(" +", "  ", rows[-1])
    found = json.loads((output / "table.json").read_text())
    assert found["single"]["scenes"] == 3 and found["multi"]["groups"] == 2
    for kind, metrics in (("one", ("dino", "clip_t")), ("multi", ("dinov2_crop", "missing"))):
        for metric in metrics:
            estimates = found[kind]["metrics"][metric]
            assert estimates.keys() == {"base", "dpo", "focus_dpo"}
            for name in ("dpo", "focus_dpo"):
                assert estimates[name]["difference"]["mean"] == pytest.approx(
                    estimates[name]["mean"]["mean"] - estimates["base"]["mean"]["mean"]
                )
    assert found["logit_scale"]["dpo"] > 0
    again = stages(launch(tmp_path, "reproduce.sh", **variables))
    assert all(done for name, done in again if name != "table") and len(again) == len(
        stages(result)
    )
