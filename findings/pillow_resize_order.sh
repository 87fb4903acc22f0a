#!/usr/bin/env bash
# Pillow 12.3.0 and 13.0.0.
# Image.resize resizes width and height one after the other and rounds to 8 bits in between. Until
# 12 the width comes first; 13 begins with the height where that shrinks more than the width (pull
# request 9549). So the same call gives other pixels, one level here and there, and so does an image
# processor that resizes to a fixed height and width, or an image of a few pixels. Photographs whose
# shape is kept, as CLIP does, came out alike. Tests that compare pixels must use one Pillow.
# Output seen:
#   12.3.0 40 x 77 to 20 x 33: as width first | 91 x 60 to 70 x 50: as width first
#   13.0.0 40 x 77 to 20 x 33: as height first | 91 x 60 to 70 x 50: as width first
# Fails if the behaviour changes. With another Python: PYTHON=python3.13 findings/THIS.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"

cat > "$folder/order.py" <<'PYTHON'
import numpy as np
import PIL
from PIL import Image


def order(width, height, new_width, new_height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    whole = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    steps = {"width first": (new_width, height), "height first": (width, new_height)}
    for name, between in steps.items():
        half = image.resize(between, Image.Resampling.BICUBIC)
        if half.resize((new_width, new_height), Image.Resampling.BICUBIC) == whole:
            return f"as {name}"
    return "neither"


shapes = [(40, 77, 20, 33), (91, 60, 70, 50)]
outcomes = [order(*shape) for shape in shapes]
print(
    PIL.__version__,
    " | ".join(
        f"{w} x {h} to {nw} x {nh}: {text}"
        for (w, h, nw, nh), text in zip(shapes, outcomes, strict=True)
    ),
)
first = "height" if int(PIL.__version__.split(".")[0]) >= 13 else "width"
assert outcomes == [f"as {first} first", "as width first"]
PYTHON

for version in 12.3.0 13.0.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        "pillow==$version" "numpy<2.5"
    "$folder/venv/bin/python" "$folder/order.py"
done
