"""A small manifest of three pairs in memory: its lines as dicts, its files by name."""

import io
import itertools
import json
import struct

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
            mask[6:18, 8 + 9 * j : 15 + 9 * j] = True
            rejected[mask] = 255 - rejected[mask] // 2
            name = f"{i}/{j}"
            reference = draw.integers(0, 256, (20, 16, 3), np.uint8)
            marked = np.zeros((20, 16), bool)
            marked[4:16, 3:13] = True
            files |= {
                f"{name}_reference.png": encoded(reference),
                f"{name}_reference_mask.png": encoded(marked),
            }
            subject = {
                "phrase": "a thing",
                "reference": f"{name}_reference.png",
                "reference_mask": f"{name}_reference_mask.png",
            }
            if i % 3 < 2:
                files[f"{name}_mask.png"] = encoded(mask)
                subject["mask"] = f"{name}_mask.png"
            subjects.append(subject)
        files |= {f"{i}/chosen.png": encoded(chosen), f"{i}/rejected.png": encoded(rejected)}
        lines.append(
            {
                "caption": f"thing number {i}",
                "chosen": f"{i}/chosen.png",
                "rejected": f"{i}/rejected.png",
                "subjects": subjects,
            }
        )
    return lines, files


def write(folder, lines, files):
    """Writes the manifest (lines are dicts, or bytes as they are) and its files; returns its path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        + b"\n"
    )
    return manifest


# Red, green and blue of unit strength as XYZ under D50, and the gamma (IEC 61966-2-5; SMPTE RP 431
# with a plain gamma in place of sRGB's curve).
ADOBE_RGB = (
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
    2.19921875,
)
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
    2.19921875,
)


def icc_profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    """An ICC profile of version 2 with `tags`, {signature: content}, made by hand (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = (
        struct.pack(">I4sI", start + len(body), bytes(4), 0x02400000)
        + kind
        + space
        + connection
        + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + _xyz(0.9642, 1.0, 0.8249)[8:]
    )
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(red, green, blue, gamma):
    """The profile of an RGB space with three primaries and a gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return icc_profile(
        b"RGB ",
        {
            b"rXYZ": _xyz(*red),
            b"gXYZ": _xyz(*green),
            b"bXYZ": _xyz(*blue),
            b"rTRC": curve,
            b"gTRC": curve,
            b"bTRC": curve,
        },
    )


def grey_profile(gamma):
    """The profile of greys with a gamma."""
    return icc_profile(
        b"GRAY", {b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))}
    )


def cmyk_profile():
    """A profile of inks that are duller than Pillow takes them without one: a table to CIELAB."""
    straight = bytes(range(256))
    colours = b""
    for cyan, magenta, yellow, black in itertools.product((0, 1), repeat=4):
        light = (
            0.95 * (1 - 0.8 * black) * (1 - 0.4 * cyan) * (1 - 0.45 * magenta) * (1 - 0.1 * yellow)
        )
        paper = 1 - black
        colours += bytes(
            [
                round(255 * light),
                128 + round(paper * (60 * magenta - 30 * cyan)),
                128 + round(paper * (70 * yellow - 40 * cyan)),
            ]
        )
    table = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(0x10000 * (i % 4 == 0) for i in range(9)))
        + 4 * straight
        + colours
        + 3 * straight
    )
    return icc_profile(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def _xyz(*values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * x) for x in values))
