r"""How many pictures of 1024 pixels a core reads, beside a PyTorch DataLoader with PIL.

    python benchmarks/loader.py --output=runs/loader

Pairs of two subjects: chosen, rejected and two references, which are scaled to the image encoder's
224 pixels, with all their masks, stacked to batches. Ours reads them from a data set as `prepare`
makes it, by threads and by worker processes. The DataLoader reads a PNG file a picture with PIL, in
processes as is usual: files that PIL has written and, to tell decoders from files, those that our
data set holds. All work in turns, and the CPU time of all processes is what counts as cores. The
pictures are noise that is rough and smooth as photographs are. Where the encoders have seen
everything once, pairs are read as what SDXL's said of them.

The last lines compare that with what a step takes: SDXL's operations for a pair, on an accelerator
that does `--tflops` of them.
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

SIDE, REFERENCE, SEEN, SUBJECTS = 1024, 518, 224, 2
PICTURES = 2 + SUBJECTS  # Of a pair.
CAPTION = "a thing and another thing beside it"
# Of a pair: two policy passes with gradients and what is computed again for them (model.remat), and
# two of the reference model. One is 6.76 TFLOP at 1024 pixels.
TERAFLOP = (2 * (1 + 1 + 2) + 2) * 6.76


def noise(draw, side: int):
    """uint8 [side, side, 3], rough and smooth as photographs are: every octave has its share."""
    total, cell = np.full((side, side, 3), 128, np.float32), side
    while cell >= 2:
        grid = draw.normal(0, 40 * (cell / side) ** 0.5, (side // cell + 1,) * 2 + (3,))
        total += cv2.resize(grid.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        cell //= 2
    return np.clip(total, 0, 255).astype(np.uint8)


def disc(side: int, y, x, radius: int):
    """bool [side, side]."""
    return np.hypot(*np.mgrid[-y : side - y, -x : side - x]) < radius


def make_record(draw):
    """A pair with its subjects as `prepare` makes them."""
    chosen = noise(draw, SIDE)
    rejected, prior, subjects = chosen.copy(), np.zeros((SIDE, SIDE), bool), []
    for _ in range(SUBJECTS):
        x, y = draw.integers(200, 800, 2)
        mask = disc(SIDE, x, y, 180)
        rejected[mask] = 255 - rejected[mask]
        prior |= mask
        subjects.append(
            {
                "phrase": "a thing",
                "reference": noise(draw, REFERENCE),
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
    """The record's pictures and masks as PNG files; `encode` makes their contents."""
    folder.mkdir(parents=True)
    named = {f"{name}.png": record[name] for name in ("chosen", "rejected", "prior_mask")}
    for slot, subject in enumerate(record["subjects"]):
        named |= {
            f"{slot}_{name}.png": subject[name] for name in ("reference", "reference_mask", "mask")
        }
    for name, pixels in named.items():
        (folder / name).write_bytes(encode(pixels))


def by_pil(pixels):
    """A picture or a mask as PIL writes it."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


class Files:
    """What PyTorch's DataLoader reads: a folder of files a pair, by PIL."""

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
            "references": torch.stack([read(f"{i}_reference.png", SEEN) for i in slots]),
            "reference_masks": torch.stack(
                [read(f"{i}_reference_mask.png", SEEN, mask=True) for i in slots]
            ),
            "masks": torch.stack([read(f"{i}_mask.png", mask=True) for i in slots]),
            "index": index,
        }


def encoded(folder: pathlib.Path, count: int):
    """A source of pairs as SDXL's encoders leave them: random numbers of the same shapes."""
    from focusdpo_jax.models.generator import ImageView
    from focusdpo_jax.training import encoding, encoding_cache

    draw, side = np.random.default_rng(0), SIDE // 8

    def normal(*shape, dtype=np.float32) -> Any:
        return draw.normal(size=(1, *shape)).astype(dtype)

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
    """What CLIP's tokenizer gives, of nothing."""
    return np.zeros((2, 77), np.int32)


def itself(entry):
    """Encoded pairs are as the step takes them."""
    return entry


def ours(source, workers: int, batch_size: int, transform=None):
    """Our loader: an iterator over batches, and what ends it."""
    from focusdpo_jax.data import loader

    transform = transform or loader.pair_transform(
        tokenize=tokenize, num_subjects=SUBJECTS, reference_size=SEEN
    )
    batches = loader.make_loader(
        source, batch_size=batch_size, seed=0, transform=transform, workers=workers
    )
    return batches, batches.close


def pytorch(folders, workers: int, batch_size: int):
    """PyTorch's: the same, epoch after epoch."""
    import torch

    loader: Any = torch.utils.data.DataLoader(
        cast(Any, Files(folders)),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def forever():
        while True:
            yield from loader

    return forever(), lambda: loader._iterator and loader._iterator._shutdown_workers()


def cpu_seconds(processes):
    """CPU time that this process and those with these ids have taken."""
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
    """(pictures a second, pictures a second of CPU time) of a loader that has warmed up."""
    iterator, close = make()
    for _ in range(4):
        next(iterator)
    start, used = time.perf_counter(), cpu_seconds(children())
    for _ in range(batches):
        next(iterator)
    seconds, used = time.perf_counter() - start, cpu_seconds(children()) - used
    close()
    pictures = batches * batch_size * PICTURES
    return pictures / seconds, pictures / used


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/loader"),
        help="folder of the data; emptied first",
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batches", type=int, default=16, help="read in each turn")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--tflops",
        type=float,
        default=400.0,
        help="that an accelerator does of SDXL's step (40 %% of an H100's peak)",
    )
    options = parser.parse_args()
    from focusdpo_jax.data import dataset, images

    shutil.rmtree(options.output, ignore_errors=True)
    draw = np.random.default_rng(0)
    records = [make_record(draw) for _ in range(options.pairs)]
    folders = {}
    for kind, encode in (("PIL's", by_pil), ("our", images.encode_png)):
        folders[kind] = [options.output / kind / f"{i:04d}" for i in range(options.pairs)]
        for record, folder in zip(records, folders[kind], strict=True):
            write_files(record, folder, encode)
    path = dataset.build(
        options.output, "benchmark", {"train": records}, {"seed": 0}, max_subjects=SUBJECTS
    )
    del records
    source = dataset.open_source(path, "train")

    seen = encoded(options.output / "encoded", options.pairs)
    size, many = options.batch_size, options.workers
    loaders = {
        "ours, threads": lambda: ours(source, 0, size),
        "ours, 1 process": lambda: ours(source, 1, size),
        f"ours, {many} processes": lambda: ours(source, many, size),
        "PyTorch, PIL's files, 1 process": lambda: pytorch(folders["PIL's"], 1, size),
        f"PyTorch, PIL's files, {many} processes": lambda: pytorch(folders["PIL's"], many, size),
        "PyTorch, our files, 1 process": lambda: pytorch(folders["our"], 1, size),
        "ours, encoded pairs, threads": lambda: ours(seen, 0, size, itself),
        "ours, encoded pairs, 1 process": lambda: ours(seen, 1, size, itself),
    }
    found = {name: [] for name in loaders}
    for _ in range(options.turns):
        for name, make in loaders.items():
            found[name].append(measure(make, options.batches, size))
    print(
        f"{'images of 1024 px (and references)':36} {'a second':>9} {'a core second':>14} "
        f"{'pairs a core second':>20}"
    )
    pairs = {}
    for name, values in found.items():
        rate, core = np.median(values, axis=0)
        pairs[name] = core / PICTURES
        print(f"{name:36} {rate:9.1f} {core:14.1f} {core / PICTURES:20.1f}")
    step = options.tflops / TERAFLOP
    print(
        f"SDXL's step takes {TERAFLOP:.1f} TFLOP a pair: at {options.tflops:.0f} TFLOP/s "
        f"{step:.1f} pairs a second. One core reads {pairs['ours, 1 process'] / step:.1f} times "
        f"as many, of encoded ones {pairs['ours, encoded pairs, 1 process'] / step:.0f} times."
    )


if __name__ == "__main__":
    main()
