"""A small manifest of three pairs in memory: its lines as dicts, its files by name."""

import io
import json

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32


def encoded(array, kind="PNG", **options):
    """An array (or a Pillow image) as a file's content."""
    if isinstance(array, np.ndarray):
        array = Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array)
    content = io.BytesIO()
    array.save(content, kind, **options)
    return content.getvalue()


def make(pairs=3):
    """(lines, files): the second line has two subjects, the third neither masks nor boxes."""
    draw = np.random.default_rng(0)
    lines, files = [], {}
    for i in range(pairs):
        chosen = draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        rejected, subjects = chosen.copy(), []
        for j in range(1 + (i % 3 == 1)):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[6:18, 8 + 9 * j:15 + 9 * j] = True
            rejected[mask] = 255 - rejected[mask] // 2
            name = f"{i}/{j}"
            reference = draw.integers(0, 256, (20, 16, 3), np.uint8)
            marked = np.zeros((20, 16), bool)
            marked[4:16, 3:13] = True
            files |= {f"{name}_reference.png": encoded(reference),
                      f"{name}_reference_mask.png": encoded(marked)}
            subject = {"phrase": "a thing", "reference": f"{name}_reference.png",
                       "reference_mask": f"{name}_reference_mask.png"}
            if i % 3 < 2:
                files[f"{name}_mask.png"] = encoded(mask)
                subject["mask"] = f"{name}_mask.png"
            subjects.append(subject)
        files |= {f"{i}/chosen.png": encoded(chosen), f"{i}/rejected.png": encoded(rejected)}
        lines.append({"caption": f"thing number {i}", "chosen": f"{i}/chosen.png",
                      "rejected": f"{i}/rejected.png", "subjects": subjects})
    return lines, files


def write(folder, lines, files):
    """Writes the manifest (lines are dicts, or bytes as they are) and its files; returns its path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return manifest
