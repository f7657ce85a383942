"""A small manifest for `disrupt`: its lines as dicts, its files by name."""

import numpy as np
from example_pairs import encoded
from PIL import Image

HEIGHT, WIDTH = 40, 52


def make():
    """(lines, files): one subject, two that overlap, one in a JPEG without a reference."""
    draw = np.random.default_rng(0)
    lines, files = [], {}
    for i, count in enumerate((1, 2, 1)):
        smooth = Image.fromarray(draw.integers(0, 256, (5, 6, 3), np.uint8))
        picture = smooth.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        name = f"{i}.{'jpg' if i == 2 else 'png'}"
        files[name] = encoded(picture, "JPEG" if i == 2 else "PNG")
        lines.append({"caption": "a star and a ball on grass", "chosen": name, "subjects": []})
        for j in range(count):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[9 + 4 * j : 25 + 4 * j, 5 + 14 * j : 22 + 14 * j] = True
            files[f"{i}_{j}_mask.png"] = encoded(mask)
            subject = {"phrase": "a star" if j else "a ball", "mask": f"{i}_{j}_mask.png"}
            if i < 2:
                marked = np.zeros((20, 16), bool)
                marked[4:16, 3:13] = True
                reference = draw.integers(0, 256, (20, 16, 3), np.uint8)
                files |= {
                    f"{i}_{j}.png": encoded(reference),
                    f"{i}_{j}_reference.png": encoded(marked),
                }
                subject |= {"reference": f"{i}_{j}.png", "reference_mask": f"{i}_{j}_reference.png"}
            lines[-1]["subjects"].append(subject)
    lines[0] |= {"group": "the ball", "info": [1, 2]}
    lines[0]["subjects"][0]["info"] = {"from": "a test"}
    return lines, files
