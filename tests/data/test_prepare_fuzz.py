"""Bad manifests made out of a good one: each is refused with its line, its field and the reason.

None may take long or much memory, and none may leave anything but its report.
"""

import contextlib
import copy
import functools
import io
import json
import os
import pathlib
import re
import signal
import struct
import zlib

import example_pairs
import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.data import prepare
from focusdpo_jax.errors import UserError

SETTINGS = prepare.Settings(resolution=16, max_subjects=3)
HEIGHT, WIDTH = example_pairs.HEIGHT, example_pairs.WIDTH
BAD_FILE = r"truncated|damaged|is not an image"
LONGEST = 60  # Seconds for a manifest, which takes milliseconds.
MEMORY = 100 << 20  # Bytes that one may take; a bomb asks for 240 MB and more.


class Case:
    """A copy of the good manifest; every method of SPOIL breaks line `i` and returns the message."""

    def __init__(self, lines, files, draw):
        self.lines, self.files, self.draw = copy.deepcopy(lines), dict(files), draw
        self.i = int(draw.integers(len(lines)))
        self.line = self.lines[self.i]
        self.slot = int(draw.integers(len(self.line["subjects"])))
        self.subject = self.line["subjects"][self.slot]
        self.after = lambda folder: None  # What plain files cannot show.

    def pick(self, *choices):
        return choices[int(self.draw.integers(len(choices)))]

    def file_field(self, masks=True):
        """Any field that names a file: (its dict, its key, its full name)."""
        found = [(self.line, key, key) for key in ("chosen", "rejected", "prior_mask")]
        found += [
            (self.subject, key, f"subjects[{self.slot}].{key}")
            for key in ("reference", "reference_mask", "mask")
        ]
        return self.pick(*(f for f in found if f[1] in f[0] and (masks or "mask" not in f[1])))

    def any_object(self):
        return self.pick((self.line, ""), (self.subject, f"subjects[{self.slot}]."))

    def new_file(self, content, name="new.png"):
        self.files[name] = content
        return name

    def noise(self, height=HEIGHT, width=WIDTH):
        return self.draw.integers(0, 256, (height, width, 3), np.uint8)


def missing_file(case):
    where, key, field = case.file_field()
    where[key] = case.pick("none.png", "0/none/none.png", "x" * 300, "manifest.jsonl/x")
    return field, "no such file|cannot be read"


def no_file(case):
    where, key, field = case.file_field()
    if case.pick(True, False):
        where[key] = "0"
    else:
        where[key] = "pipe"
        case.after = lambda folder: os.mkfifo(folder / "pipe")
    return field, "is not a regular file"


def empty_file(case):
    where, key, field = case.file_field()
    where[key] = case.new_file(b"")
    return field, "is an empty file"


def no_picture(case):
    where, key, field = case.file_field()
    where[key] = case.new_file(
        case.pick(
            case.draw.bytes(300),
            b"<svg></svg>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n" * 20,
            b"\x00",
            b"\n" * 99,
        )
    )
    return field, "is not an image"


def cut_off(case):
    where, key, field = case.file_field()
    kind = case.pick("PNG", "JPEG", "WEBP", "BMP", "TIFF")
    content = example_pairs.encoded(case.noise(), kind)
    where[key] = case.new_file(content[: int(case.draw.integers(1, int(len(content) * 0.7)))])
    return field, BAD_FILE


def damaged(case):
    where, key, field = case.file_field()
    content = bytearray(example_pairs.encoded(case.noise()))
    at = int(case.draw.integers(50, len(content) - 40))
    content[at] ^= 0xFF
    where[key] = case.new_file(bytes(content))
    return field, BAD_FILE


def bomb(case):
    """A small file whose header declares a huge image."""
    where, key, field = case.file_field()
    side = case.pick(9000, 40000, 65000)
    content = case.pick(
        png(side, zlib.compress(bytes(10000))),
        png(2**30, zlib.compress(bytes(10000))),
        patched("BMP", 18, "<ii", side, side),
        patched("GIF", 6, "<HH", side, side),
        patched("TIFF", b"\x00\x01\x04\x00\x01\x00\x00\x00", "<I", side),
        patched("JPEG", b"\xff\xc0\x00\x11\x08", ">HH", side, side),
    )
    where[key] = case.new_file(content)
    return field, "million|far too many pixels"


def compressed_text(case):
    """An image whose comment, when it is unpacked, has 256 MiB."""
    where, key, field = case.file_field()
    where[key] = case.new_file(
        png(16, zlib.compress(bytes(10000)), chunk(b"zTXt", b"Comment\0\0" + zeros()))
    )
    return field, "damaged"


@functools.cache
def zeros():
    """Zeros as zlib compresses them, a thousandth in size."""
    compressor = zlib.compressobj(1)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()


def png(side, pixels, *chunks):
    """A PNG file of a square image, with these chunks before its pixels."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + b"".join(chunks)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def patched(kind, where, form, *values):
    """An image's file with other numbers at a place, or behind bytes that occur once."""
    content = bytearray(example_pairs.encoded(np.zeros((4, 4, 3), np.uint8), kind))
    at = where if isinstance(where, int) else content.index(where) + len(where)
    struct.pack_into(form, content, at, *values)
    return bytes(content)


def wrong_depth(case):
    where, key, field = case.file_field()
    image = Image.fromarray(case.noise()[..., 0].astype(np.float32))
    image = (
        image
        if case.pick(True, False)
        else Image.fromarray(np.full((HEIGHT, WIDTH), 2**20, np.int32))
    )
    where[key] = case.new_file(example_pairs.encoded(image, "TIFF"))
    return field, "32 bits|more than 16 bits"


def frames(case):
    where, key, field = case.file_field()
    images = [Image.fromarray(case.noise()) for _ in range(3)]
    where[key] = case.new_file(
        example_pairs.encoded(
            images[0], case.pick("GIF", "TIFF", "WEBP"), save_all=True, append_images=images[1:]
        )
    )
    return field, "has several frames"


def rejected_size(case):
    case.line["rejected"] = case.new_file(
        example_pairs.encoded(
            case.noise(*case.pick((WIDTH, HEIGHT), (HEIGHT, WIDTH + 1), (12, 16)))
        )
    )
    return "rejected", rf"pixels and chosen is {HEIGHT} x {WIDTH}"


def turned(case):
    exif = Image.Exif()
    exif[0x0112] = case.pick(5, 6, 7, 8)
    case.line["rejected"] = case.new_file(example_pairs.encoded(case.noise(), "JPEG", exif=exif))
    return "rejected", f"is {WIDTH} x {HEIGHT} pixels and chosen is {HEIGHT} x {WIDTH}"


def mask_size(case):
    key = case.pick("prior_mask", "mask", "reference_mask")
    where = case.line if key == "prior_mask" else case.subject
    where[key] = case.new_file(
        example_pairs.encoded(np.ones(case.pick((8, 8), (WIDTH, HEIGHT), (48, 64)), bool))
    )
    return ("" if key == "prior_mask" else f"subjects[{case.slot}].") + key, "pixels and .* is"


def mask_empty(case):
    key = case.pick("prior_mask", "mask", "reference_mask")
    where = case.line if key == "prior_mask" else case.subject
    shape = (20, 16) if key == "reference_mask" else (HEIGHT, WIDTH)
    where[key] = case.new_file(example_pairs.encoded(np.zeros(shape, bool)))
    return ("" if key == "prior_mask" else f"subjects[{case.slot}].") + key, "is empty"


def mask_of_labels(case):
    content = np.zeros((20, 16), np.uint8)
    content[5:9, 5:9] = case.pick(1, 2, 100)
    case.subject["reference_mask"] = case.new_file(example_pairs.encoded(content))
    return f"subjects[{case.slot}].reference_mask", "is not a mask: its lightest"


def box_outside(case):
    case.subject["box"] = case.pick(
        [0.1, 0.1, 1.2, 0.5],
        [-0.1, 0, 1, 1],
        [4, 5, 20, 22],
        [0.1, 0.1, 0.2, float("nan")],
        [0, 0, 1e999, 1],
    )
    return f"subjects[{case.slot}].box", "reaches outside"


def box_empty(case):
    case.subject["box"] = case.pick([0.5, 0.1, 0.5, 0.5], [0.6, 0.1, 0.2, 0.5], [0, 1, 1, 1])
    return f"subjects[{case.slot}].box", "is empty"


def box_form(case):
    case.subject["box"] = case.pick([0, 0, 1], "0 0 1 1", {"x": 0}, [0, 0, 1, None], 7, [True] * 4)
    return f"subjects[{case.slot}].box", "give \\[x0, y0, x1, y1\\]"


def box_beside_mask(case):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:12, :12] = True
    case.subject |= {
        "mask": case.new_file(example_pairs.encoded(mask)),
        "box": case.pick([0.5, 0.5, 1, 1], [0.3, 0, 1, 1], [0, 0, 0.1, 0.1]),
    }
    return f"subjects[{case.slot}].box", r"holds \d+% of the mask"


def equal_pair(case):
    content = case.files[case.line["chosen"]]
    if case.pick(True, False):
        content = example_pairs.encoded(Image.open(io.BytesIO(content)), "BMP")
    case.line["rejected"] = case.new_file(content)
    return "rejected", "equals chosen"


def invisible_difference(case):
    pixels = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    case.line["chosen"] = case.new_file(example_pairs.encoded(pixels), "c.png")
    noise = case.draw.integers(0, 16, pixels.shape, np.uint8)
    case.line["rejected"] = case.new_file(example_pairs.encoded(pixels + noise), "r.png")
    return "rejected", "nowhere by 16"


def prior_misses(case):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, : case.pick(1, 4, 9)] = True
    case.line["prior_mask"] = case.new_file(example_pairs.encoded(mask))
    return "prior_mask", r"misses \d+% of where"


def union_misses(case):
    for subject in case.line["subjects"]:
        subject["box"] = [0.8, 0.8, 1, 1]
        subject.pop("mask", None)
    return "prior_mask", r"misses .* \(the union of the subjects' masks\)"


def long_caption(case):
    words = case.pick(["a"], ["dog", ","], ["it's", "1984"], ["é"])
    case.line["caption"] = " ".join(words * case.pick(80, 200, 9000))
    return "caption", r"at least \d+ tokens and CLIP reads 77"


def subject_count(case):
    case.line["subjects"] = case.pick([], case.line["subjects"] * 4)
    return "subjects", r"has \d entries; give 1 to 3"


def not_utf8(case):
    text = json.dumps(case.line).encode()
    at = text.index(b"thing") + int(case.draw.integers(5))
    case.lines[case.i] = text[:at] + case.pick(b"\xff", b"\xc3(", b"\xe9", b"\x80") + text[at:]
    return "", "is not UTF-8 text"


def half_character(case):
    where, field = case.any_object()
    key = "caption" if where is case.line else "phrase"
    where[key] = "a \ud83d thing"
    return field + key, "surrogate"


def escape(case):
    where, key, field = case.file_field()
    name = case.pick(
        "../outside.png",
        "0/../../outside.png",
        "/etc/hostname",
        "~/a.png",
        "link.png",
        "folder/outside.png",
        "gs://bucket/a.png",
        "..",
        "0/../../",
        "..\\outside.png",
    )
    where[key] = name

    def after(folder):
        (folder.parent / "outside.png").write_bytes(example_pairs.encoded(case.noise()))
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        (folder / "folder").symlink_to(folder.parent)

    case.after = after
    return field, "is outside the manifest's folder"


def not_json(case):
    text = json.dumps(case.line).encode()
    case.lines[case.i] = case.pick(
        text[: int(case.draw.integers(1, len(text)))],
        b"chosen,rejected",
        text + b",",
        text + text,
        text.replace(b'"', b"'"),
        b"\x00",
        b"[" * 200_000,
        b'{"caption": ' + b"9" * 5000 + b"}",
    )
    return "", "is not JSON|nested too deeply"


def not_an_object(case):
    case.lines[case.i] = case.pick(b"[1, 2]", b'"text"', b"7", b"null", b"[]")
    return "", "is not a JSON object"


def long_line(case):
    case.lines[case.i] = json.dumps(case.line).encode() + b" " * (case.pick(1, 2, 3) << 20)
    return "", "is longer than 1 MiB"


def given_twice(case):
    text = json.dumps(case.line).encode()
    key = case.pick("caption", "chosen", "rejected")
    case.lines[case.i] = text[:-1] + f', "{key}": "again"}}'.encode()
    return key, "is given twice"


def missing_field(case):
    where, field = case.any_object()
    keys = (
        ("caption", "chosen", "rejected", "subjects")
        if where is case.line
        else ("phrase", "reference", "reference_mask")
    )
    key = case.pick(*keys)
    if case.pick(True, False):
        del where[key]
        return field + key, "is missing; give a"
    where[key] = case.pick(None, 7, {}, 0.5, False)
    return field + key, "is .*; give a"


def empty_text(case):
    where, field = case.any_object()
    key = case.pick(*(k for k in ("caption", "phrase", "chosen", "reference") if k in where))
    where[key] = case.pick("", " ", "\n\t")
    return field + key, "is empty; "


def zero_character(case):
    where, key, field = case.file_field()
    where[key] = "0/\0.png"
    return field, "NUL character"


def misspelt(case):
    where, field = case.any_object()
    key = case.pick(*(k for k in ("caption", "rejected", "subjects", "phrase") if k in where))
    at = int(case.draw.integers(1, len(key)))
    wrong = key[:at] + key[at + 1 :]
    where[wrong] = where.pop(key)
    return field + wrong, f"is not a field; did you mean {key}"


def subject_form(case):
    case.line["subjects"][case.slot] = case.pick("a dog", 7, None, [])
    return f"subjects[{case.slot}]", "is not a JSON object"


def too_small(case):
    size = case.pick((3, 32), (24, 2), (1, 1))
    for key in ("chosen", "rejected"):
        case.line[key] = case.new_file(
            example_pairs.encoded(np.full((*size, 3), 200 * (key == "chosen"), np.uint8)),
            key + ".png",
        )
    for subject in case.line["subjects"]:
        subject.pop("mask", None)
    return "chosen", "too small for 16; give at least 4"


def outside_crop(case):
    """Two subjects at the ends of a panorama: a square holds at most one of them."""
    chosen, prior = np.zeros((8, 64, 3), np.uint8), np.ones((8, 64), bool)
    masks = np.zeros((2, 8, 64), bool)
    masks[0, :, :4], masks[1, :, 60:] = True, True
    add = case.new_file
    case.line |= {
        "chosen": add(example_pairs.encoded(chosen), "c.png"),
        "rejected": add(example_pairs.encoded(chosen + 99), "r.png"),
        "prior_mask": add(example_pairs.encoded(prior), "p.png"),
        "subjects": [
            case.subject | {"mask": add(example_pairs.encoded(m), f"m{i}.png")}
            for i, m in enumerate(masks)
        ],
    }
    return "prior_mask", "has only 12% of its pixels inside the square"


SPOIL = [
    missing_file,
    no_file,
    empty_file,
    no_picture,
    cut_off,
    damaged,
    bomb,
    compressed_text,
    wrong_depth,
    frames,
    rejected_size,
    turned,
    mask_size,
    mask_empty,
    mask_of_labels,
    box_outside,
    box_empty,
    box_form,
    box_beside_mask,
    equal_pair,
    invisible_difference,
    prior_misses,
    union_misses,
    long_caption,
    subject_count,
    not_utf8,
    half_character,
    escape,
    not_json,
    not_an_object,
    long_line,
    given_twice,
    missing_field,
    empty_text,
    zero_character,
    misspelt,
    subject_form,
    too_small,
    outside_crop,
]
ROUNDS = 9  # 39 kinds of mistakes, 351 manifests.


@contextlib.contextmanager
def bounded():
    """Fails a test that hangs, or that uses more memory than images of these sizes need."""

    def hangs(*_):
        raise TimeoutError("this manifest keeps prepare busy")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LONGEST)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
        start = memory("VmRSS")
        yield
        assert memory("VmHWM") - start < MEMORY
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def memory(name):
    """Reads a line of /proc/self/status, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("number", range(len(SPOIL)), ids=lambda n: SPOIL[n].__name__)
def test_bad_manifest_is_refused_with_line_and_reason(number, tmp_path):
    lines, files = example_pairs.make()
    for round_ in range(ROUNDS):
        case = Case(lines, files, np.random.default_rng([number, round_]))
        field, reason = SPOIL[number](case)
        folder = tmp_path / str(round_) / "pairs"
        manifest = example_pairs.write(folder, case.lines, case.files)
        case.after(folder)
        output = tmp_path / str(round_) / "output"
        with bounded(), pytest.raises(UserError) as caught:
            prepare.prepare(manifest, output, SETTINGS, draw_sheet=None)

        told = str(caught.value)
        assert told.startswith("1 of 3 lines are refused; line "), told
        assert "\n" not in told and "Traceback" not in told
        assert [path.name for path in output.iterdir()] == ["report.json"]
        report = json.loads((output / "report.json").read_text())
        assert report["status"] == "refused" and report["accepted"] == 2
        (entry,) = report["refused"]
        assert (entry["line"], entry["field"]) == (case.i + 1, field), entry
        assert re.search(reason, entry["reason"], re.DOTALL), (reason, entry)
        assert f"line {case.i + 1}: " in told and entry["reason"] in told


def test_the_good_manifest_is_good(tmp_path, monkeypatch):
    """Otherwise the tests above could pass for another reason."""
    manifest = example_pairs.write(tmp_path, *example_pairs.make())
    monkeypatch.setattr(prepare, "_build", lambda *_: None)
    report = prepare.prepare(manifest, tmp_path / "output", SETTINGS, draw_sheet=None)
    assert report["accepted"] == 3 and not report["refused"]


UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3
ODD = {
    "cmyk": lambda pixels: example_pairs.encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
    "16 bit": lambda pixels: example_pairs.encoded(
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    ),
    "alpha": lambda pixels: example_pairs.encoded(np.dstack([pixels, pixels[..., :1]])),
    "palette": lambda pixels: example_pairs.encoded(Image.fromarray(pixels).convert("P")),
    "grey": lambda pixels: example_pairs.encoded(pixels[..., 0]),
    "rotated": lambda pixels: example_pairs.encoded(pixels, "JPEG", exif=UPSIDE_DOWN),
}


@pytest.mark.parametrize("mode", ODD)
def test_unusual_images_are_converted_and_counted(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_build", lambda *_: None)
    lines, files = example_pairs.make()
    case = Case(lines, files, np.random.default_rng(0))
    for line, name in ((0, "odd_0"), (1, "odd_1")):
        case.lines[line]["subjects"][0]["reference"] = case.new_file(
            ODD[mode](case.noise(20, 16)), name
        )
    manifest = example_pairs.write(tmp_path, case.lines, case.files)
    report = prepare.prepare(manifest, tmp_path / "output", SETTINGS, draw_sheet=None)
    assert report["accepted"] == 3 and report["changes"] == {mode: 2}
