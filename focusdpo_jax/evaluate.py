"""Draws a benchmark with base and policy, measures both, and writes a report.

    python -m focusdpo_jax.evaluate --config=configs/toybox_dpo.py --output=evaluations/toybox
    python -m focusdpo_jax.evaluate --workdir=runs/sdxl --output=evaluations/dreambench \\
        --dreambench=dreambooth/dataset --dinov2=dinov2-small --clip=clip-vit-base-patch32
    python -m focusdpo_jax.evaluate --compare evaluations/focus_dpo evaluations/dpo

Run the same line again to go on where an evaluation was stopped. docs/evaluation.md says what is
measured.
"""

import functools

from absl import flags
from etils import epath
from ml_collections import config_flags

from focusdpo_jax import command
from focusdpo_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration that says which Toybox scenes, which base and how to draw. "
    "Default: that of the run.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a run, a model (a run's model/ or a pipeline of diffusers), or "
    "base, the model that --config starts from. Default: runs/<config name>.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for images, scores, results.json and "
    "report.html; with --compare for comparison.json. May be gs://.",
)
_DREAMBENCH = flags.DEFINE_string(
    "dreambench",
    None,
    "Instead of Toybox, DreamBench's dataset folder: every subject with 25 prompts.",
)
_SCENES = flags.DEFINE_string(
    "scenes",
    None,
    "Instead of Toybox, a JSON list of scenes of one or more subjects, in the "
    "layout of UNO's benchmark files; images that are not found beside it are looked for in "
    "--dreambench.",
)
_PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "all",
    ["all", "one"],
    "Compare with all photographs of a subject, or with the one that is the reference.",
)
_SAMPLES = flags.DEFINE_integer(
    "samples", None, "Images of each prompt. Default: 4, of Toybox 1.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer("limit", None, "The first so many images alone.", lower_bound=1)
_IMAGES = flags.DEFINE_string(
    "images",
    None,
    "Score the images of this folder, drawn by another program from the "
    "scenes.jsonl in --output, as the policy's.",
)
_DINO = flags.DEFINE_string("dino", None, "Folder of DINO ViT-S/16 in transformers' layout.")
_DINOV2 = flags.DEFINE_string("dinov2", None, "Folder of DINOv2 in transformers' layout.")
_CLIP = flags.DEFINE_string(
    "clip",
    None,
    "Folder of CLIP ViT-B/32 in transformers' layout, with its tokenizer: CLIP-I and CLIP-T.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first image's noise, and of the bootstrap.")
_STEPS = flags.DEFINE_integer(
    "steps", None, "Denoiser calls. Default: config.sampling.steps.", lower_bound=1
)
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Classifier-free guidance; 1 or less is none. Default: config.sampling.guidance.",
)
_SAMPLER = flags.DEFINE_string("sampler", "ddim", "ddim, euler, euler_a or dpmpp_2m.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Images drawn or scored at once, divided among the devices. Default: "
    "config.evaluation.batch_size, or 16.",
    lower_bound=1,
)
_SHARE = flags.DEFINE_string(
    "share",
    "0/1",
    "i/n: draw and score the i-th of n shares alone. Start n processes with one "
    "--output, each with a share from 0 to n - 1; then the same line without --share.",
)
_CASES = flags.DEFINE_integer(
    "cases", 6, "Best and worst scenes each that the report shows.", lower_bound=0
)
_COMPARE = flags.DEFINE_multi_string(
    "compare",
    [],
    "Output folders of finished evaluations: one table, and how each differs from the first.",
)


def main():
    """Flags, then `runner.run` or `comparison.compare`."""
    # After the flags, so that --help is quick.
    from focusdpo_jax.evaluation import comparison, runner, tables
    from focusdpo_jax.evaluation.output_folder import OutputFolder

    if _COMPARE.value:
        compared = comparison.compare(_COMPARE.value)
        print(comparison.format_comparison(compared))
        if _OUTPUT.value:
            folder = OutputFolder(_OUTPUT.value)
            folder.claim({"compare": _COMPARE.value})
            folder.write("comparison.json", compared)
        return
    if _OUTPUT.value is None:
        raise UserError("give --output, the folder for images and results.")
    share = read_share()
    config, sides, workdir = open_models()
    batch_size = _BATCH_SIZE.value or (config.evaluation.batch_size if config else 16)
    benchmark = make_benchmark(config, batch_size)
    folder = OutputFolder(_OUTPUT.value)
    results = runner.run(
        folder,
        benchmark,
        sides,
        sampling(config) if sides else None,
        batch_size=batch_size,
        share=share,
        images=_IMAGES.value,
        workdir=workdir,
        cases=_CASES.value,
    )
    if results:
        print(benchmark.about, "Mean and 95 % interval; * where a difference's leaves out 0.")
        print(tables.format_results(results))
        print(f"{folder.path / 'report.html'}")


def read_share():
    """(i, n) of --share=i/n."""
    index, _, count = _SHARE.value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--share={_SHARE.value}: give i/n with 0 <= i < n, such as 0/4.")
    return int(index), int(count)


def open_models():
    """(RunConfig or None, {side: function that loads its model}, folder of the run or None)."""
    from focusdpo_jax import config as config_lib
    from focusdpo_jax.checkpoints import pretrained
    from focusdpo_jax.training import models, runs

    config, name = _CONFIG.value, _WORKDIR.value
    if config is not None:
        config = config_lib.parse(config)
        name = name or str(
            command.default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
        )
    if _IMAGES.value:
        if config is None and _WORKDIR.value:
            config = runs.Run(name).config
        return config, {}, None
    if name is None:
        raise UserError("give --workdir, the folder of a run, or --config.")
    if name != "base" and not pretrained.is_model(name):
        run = runs.Run(name)
        config = run.config if config is None else config
        run.sizes().check_resolution(config.resolution)
        return config, {"base": run.base, "policy": run.policy}, epath.Path(name)
    if config is None:
        raise UserError(f"--workdir={name}: give --config too, which says how to draw.")
    sizes = models.generator_config(config) if name == "base" else runs.folder_sizes(name)
    sizes.check_resolution(config.resolution)
    if name == "base":
        return config, {"base": functools.partial(models.load_model, config)}, None
    return config, {"policy": functools.partial(runs.load_folder, name)}, None


def make_benchmark(config, batch_size):
    """The benchmark that the flags ask for."""
    from focusdpo_jax.evaluation import benchmarks
    from focusdpo_jax.training import models

    how = {"seed": _SEED.value, "limit": _LIMIT.value, "batch_size": batch_size}
    if _DREAMBENCH.value or _SCENES.value:
        return benchmarks.PhotographBenchmark(
            _DREAMBENCH.value,
            _SCENES.value,
            protocol=_PROTOCOL.value,
            samples=_SAMPLES.value or 4,
            networks={"dino": _DINO.value, "dinov2": _DINOV2.value, "clip": _CLIP.value},
            **how,
        )
    if config is None:
        raise UserError(
            "give --config or --workdir, which say what Toybox's scenes are, or "
            "--dreambench or --scenes."
        )
    return benchmarks.ToyboxBenchmark(
        config, models.load_probe(config), samples=_SAMPLES.value or 1, **how
    )


def sampling(config):
    """How to draw: of the configuration what no flag says."""
    return {
        "resolution": config.resolution,
        "sampler": _SAMPLER.value,
        "steps": _STEPS.value or config.sampling.steps,
        "guidance": config.sampling.guidance if _GUIDANCE.value is None else _GUIDANCE.value,
    }


def parse_flags(argv):
    """As `command.config_parser`; what follows --compare A are further folders to compare."""
    rest = command.config_parser(_CONFIG)(argv)
    if _COMPARE.value:
        flags.FLAGS.compare = _COMPARE.value + rest[1:]
        return rest[:1]
    return rest


if __name__ == "__main__":
    command.run(main, parse_flags, goes_on=True)
