r"""Images of 1024 pixels read per core, compared with a PyTorch DataLoader with PIL.

    python benchmarks/loader.py --output=runs/loader

The data are pairs with two subjects: chosen and rejected image, two references, which are resized
to the image encoder's 224 pixels, and all masks, stacked to batches. Our loader reads a data set of
`prepare`, with threads and with worker processes. The DataLoader reads one PNG file per image with
PIL, in worker processes. It reads files written by PIL and, to separate the effect of the decoder
from that of the files, the files of our data set. The loaders run alternately. Cores are measured
by the CPU time of all processes. Images are noise with the spectrum of photographs. "Encoded pairs"
are cached features with the shapes of SDXL's encoders.

The last lines compare the rate with a training step: SDXL's operations per pair, on an accelerator
with `--tflops`.
"""

import argparse
import io
import multiprocessing
import os
import pathlib
import resource
import shutil
import time
import types
from typing import Any, cast

import cv2
import jax.numpy as jnp
import numpy as np
from PIL import Image

SIDE, REFERENCE, ENCODER_SIDE, SUBJECTS = 1024, 518, 224, 2
IMAGES = 2 + SUBJECTS  # Per pair.
CAPTION = "a thing and another thing beside it"
# Per pair: for each image, the policy's forward pass, its recomputation (model.remat), its backward
# pass (twice a forward pass), and the reference model's forward pass. A forward pass is 6.76 TFLOP.
TERAFLOP = (2 * (1 + 1 + 2) + 2) * 6.76


def noise(rng, side: int):
    """Noise with a spectrum like that of photographs, uint8 [side, side, 3]: a sum of octaves."""
    total, cell = np.full((side, side, 3), 128, np.float32), side
    while cell >= 2:
        grid = rng.normal(0, 40 * (cell / side) ** 0.5, (side // cell + 1,) * 2 + (3,))
        total += cv2.resize(grid.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        cell //= 2
    return np.clip(total, 0, 255).astype(np.uint8)


def disc(side: int, y, x, radius: int):
    """Mask of a disc, bool [side, side]."""
    return np.hypot(*np.mgrid[-y : side - y, -x : side - x]) < radius


def make_record(rng):
    """Returns a random pair with its subjects, in the format of `prepare`."""
    chosen = noise(rng, SIDE)
    rejected, prior, subjects = chosen.copy(), np.zeros((SIDE, SIDE), bool), []
    for _ in range(SUBJECTS):
        x, y = rng.integers(200, 800, 2)
        mask = disc(SIDE, x, y, 180)
        rejected[mask] = 255 - rejected[mask]
        prior |= mask
        subjects.append(
            {
                "phrase": "a thing",
                "reference": noise(rng, REFERENCE),
                "reference_mask": disc(REFERENCE, 259, 259, 200),
                "mask": mask,
                "box": np.array([0, 0, 1, 1], np.float32),
            }
        )
    return {
        "caption": CAPTION,
        "chosen": chosen,
        "rejected": rejected,
        "prior_mask": prior,
        "original_size": np.array([SIDE, SIDE], np.int32),
        "crop": np.zeros(2, np.int32),
        "subjects": subjects,
    }


def write_files(record, folder: pathlib.Path, encode) -> None:
    """Writes the images and masks of a record as PNG files; `encode` maps pixels to bytes."""
    folder.mkdir(parents=True)
    arrays = {f"{name}.png": record[name] for name in ("chosen", "rejected", "prior_mask")}
    for slot, subject in enumerate(record["subjects"]):
        arrays |= {
            f"{slot}_{name}.png": subject[name] for name in ("reference", "reference_mask", "mask")
        }
    for name, pixels in arrays.items():
        (folder / name).write_bytes(encode(pixels))


def encode_with_pil(pixels):
    """Encodes an image or a mask as PNG with PIL."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


class Files:
    """Data set for PyTorch's DataLoader: one folder of files per pair, read with PIL."""

    def __init__(self, folders) -> None:
        self.folders = folders

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index):
        import torch

        def read(name, side=None, mask=False):
            with Image.open(self.folders[index] / name) as image:
                image = image.convert("L" if mask else "RGB")
                if side:
                    image = image.resize((side, side), Image.Resampling.BICUBIC)
                pixels = torch.from_numpy(np.array(image))
            return pixels >= 128 if mask else pixels

        slots = range(SUBJECTS)
        return {
            "chosen": read("chosen.png"),
            "rejected": read("rejected.png"),
            "prior_mask": read("prior_mask.png", mask=True),
            "references": torch.stack([read(f"{i}_reference.png", ENCODER_SIDE) for i in slots]),
            "reference_masks": torch.stack(
                [read(f"{i}_reference_mask.png", ENCODER_SIDE, mask=True) for i in slots]
            ),
            "masks": torch.stack([read(f"{i}_mask.png", mask=True) for i in slots]),
            "index": index,
        }


def encoded(folder: pathlib.Path, count: int):
    """Returns a source of encoded pairs: random arrays with the shapes of SDXL's encoders."""
    from focusdpo_jax.models.generator import ImageView
    from focusdpo_jax.training import encoding, encoding_cache

    rng, side = np.random.default_rng(0), SIDE // 8

    def normal(*shape, dtype=np.float32) -> Any:
        return rng.normal(size=(1, *shape)).astype(dtype)

    def encode(parameters, batch):
        return encoding.EncodedPairs(
            latents_mean=normal(2, side, side, 4),
            latents_deviation=normal(2, side, side, 4),
            token_ids=cast(Any, np.zeros((1, 2, 77), np.int32)),
            text=normal(77, 2048, dtype=jnp.bfloat16),
            pooled=normal(1280, dtype=jnp.bfloat16),
            time_ids=normal(6),
            prior=normal(side, side),
            references=ImageView(normal(SUBJECTS, 257, 1280, dtype=jnp.bfloat16)),
            present=cast(Any, np.ones((1, SUBJECTS), bool)),
            prototypes=None,
            similarity=normal(2, SUBJECTS + 1, 16, 16),
            area=normal(SUBJECTS),
            subject_masks=None,
            detail=normal(2, side, side),
            quality=normal(side, side),
            index=batch.index,
        )

    batches = (types.SimpleNamespace(index=np.array([i])) for i in range(count))
    return encoding_cache.cached(folder, {}, {}, None, dict, encode, batches, count)


def tokenize(caption):
    """Stand-in for CLIP's tokenizer: zeros of the same shape."""
    return np.zeros((2, 77), np.int32)


def identity(entry):
    """The transform of encoded pairs, which the step uses unchanged."""
    return entry


def ours(source, workers: int, batch_size: int, transform=None):
    """Our loader: returns an iterator over batches and a function that closes it."""
    from focusdpo_jax.data import loader

    transform = transform or loader.pair_transform(
        tokenize=tokenize, num_subjects=SUBJECTS, reference_size=ENCODER_SIDE
    )
    batches = loader.make_loader(
        source, batch_size=batch_size, seed=0, transform=transform, workers=workers
    )
    return batches, batches.close


def pytorch(folders, workers: int, batch_size: int):
    """PyTorch's DataLoader: returns an endless iterator and a function that closes it."""
    import torch

    loader: Any = torch.utils.data.DataLoader(
        cast(Any, Files(folders)),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def repeat():
        while True:
            yield from loader

    return repeat(), lambda: loader._iterator and loader._iterator._shutdown_workers()


def cpu_seconds(processes):
    """CPU seconds of this process and of the processes with the given ids."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for process in processes:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def children():
    """Ids of this process's worker processes."""
    return [process.pid for process in multiprocessing.active_children()]


def measure(make, batches, batch_size: int):
    """Images per second and images per second of CPU time, after a warm-up."""
    iterator, close = make()
    for _ in range(4):
        next(iterator)
    start, cpu_time = time.perf_counter(), cpu_seconds(children())
    for _ in range(batches):
        next(iterator)
    seconds, cpu_time = time.perf_counter() - start, cpu_seconds(children()) - cpu_time
    close()
    images_read = batches * batch_size * IMAGES
    return images_read / seconds, images_read / cpu_time


def main() -> None:
    """Writes the data, measures the loaders alternately and prints medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/loader"),
        help="folder of the data; deleted at the start",
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batches", type=int, default=16, help="batches per measurement")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each loader")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--tflops",
        type=float,
        default=400.0,
        help="TFLOP/s of an accelerator in SDXL's step (default: 40 %% of an H100's peak)",
    )
    options = parser.parse_args()
    from focusdpo_jax.data import dataset, images

    shutil.rmtree(options.output, ignore_errors=True)
    rng = np.random.default_rng(0)
    records = [make_record(rng) for _ in range(options.pairs)]
    folders = {}
    for kind, encode in (("PIL's", encode_with_pil), ("our", images.encode_png)):
        folders[kind] = [options.output / kind / f"{i:04d}" for i in range(options.pairs)]
        for record, folder in zip(records, folders[kind], strict=True):
            write_files(record, folder, encode)
    path = dataset.build(
        options.output, "benchmark", {"train": records}, {"seed": 0}, max_subjects=SUBJECTS
    )
    del records
    source = dataset.open_source(path, "train")

    encoded_pairs = encoded(options.output / "encoded", options.pairs)
    size, workers = options.batch_size, options.workers
    loaders = {
        "ours, threads": lambda: ours(source, 0, size),
        "ours, 1 process": lambda: ours(source, 1, size),
        f"ours, {workers} processes": lambda: ours(source, workers, size),
        "PyTorch, PIL's files, 1 process": lambda: pytorch(folders["PIL's"], 1, size),
        f"PyTorch, PIL's files, {workers} processes": lambda: pytorch(
            folders["PIL's"], workers, size
        ),
        "PyTorch, our files, 1 process": lambda: pytorch(folders["our"], 1, size),
        "ours, encoded pairs, threads": lambda: ours(encoded_pairs, 0, size, identity),
        "ours, encoded pairs, 1 process": lambda: ours(encoded_pairs, 1, size, identity),
    }
    rates = {name: [] for name in loaders}
    for _ in range(options.turns):
        for name, make in loaders.items():
            rates[name].append(measure(make, options.batches, size))
    print(
        f"{'images of 1024 px (and references)':36} {'per second':>10} {'per core-second':>15} "
        f"{'pairs per core-second':>21}"
    )
    pairs = {}
    for name, values in rates.items():
        rate, core = np.median(values, axis=0)
        pairs[name] = core / IMAGES
        print(f"{name:36} {rate:10.1f} {core:15.1f} {core / IMAGES:21.1f}")
    step = options.tflops / TERAFLOP
    print(
        f"SDXL's step takes {TERAFLOP:.1f} TFLOP per pair: at {options.tflops:.0f} TFLOP/s "
        f"{step:.1f} pairs per second. One core reads {pairs['ours, 1 process'] / step:.1f} times "
        f"as many, and {pairs['ours, encoded pairs, 1 process'] / step:.0f} times as many encoded "
        "pairs."
    )


if __name__ == "__main__":
    main()
