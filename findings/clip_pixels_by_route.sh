#!/usr/bin/env bash
# transformers 4.57.6 and 5.24.0, Pillow 12.3.0, Pillow-based CLIP image processor, no torch.
# The pixel values of one picture depend on the way it comes and on the version. A PIL image is not
# turned upright by its EXIF orientation, a path is. Transparent parts of a PIL image become white
# in version 5 and the colour that is stored there (here red) in version 4; a path gives the stored
# colour in both.
# Not run here, because PyPI's torchvision is built for torch with CUDA: the torchvision-based
# processor, version 5's default. Of 28 photographs it changed at most 1.02% of the values, by at
# most 2 of 255 levels (torchvision 0.28.0, its compiled operators left out, torch 2.13.0, a CPU).
# Output seen:
#   4.57.6 orientation by path: as upright | PIL: as stored | transparency by path: red | PIL: red
#   5.24.0 orientation by path: as upright | PIL: as stored | transparency by path: red | PIL: white
# Fails if the behaviour changes. With another Python: PYTHON=python3.13 findings/THIS.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"

cat > "$folder/routes.py" <<'PYTHON'
import sys

import numpy as np
import transformers
from PIL import Image

try:
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor
from transformers.image_utils import load_image

folder = sys.argv[1]
process = CLIPImageProcessor()


def pixels(image):
    return np.asarray(process(image, return_tensors="np")["pixel_values"][0])


def alike(picture, answers):
    return next(name for name, other in answers.items() if np.allclose(picture, pixels(other)))


halves = np.zeros((300, 300, 3), np.uint8)
halves[:, :150] = 255
stored = Image.fromarray(halves)
exif = Image.Exif()
exif[0x0112] = 6  # to be turned by 90 degrees
stored.save(f"{folder}/turned.png", exif=exif)
turns = {"as stored": stored, "as upright": stored.transpose(Image.Transpose.ROTATE_270)}

Image.new("RGBA", (300, 300), (255, 0, 0, 0)).save(f"{folder}/clear.png")
colours = {name: Image.new("RGB", (300, 300), name) for name in ("red", "white")}

routes = {"by path": load_image, "PIL": Image.open}
outcomes = {}
for what, file, answers in (
    ("orientation", "turned.png", turns),
    ("transparency", "clear.png", colours),
):
    for route, opened in routes.items():
        outcomes[what, route] = alike(pixels(opened(f"{folder}/{file}")), answers)
print(
    transformers.__version__,
    " | ".join(
        f"{what + ' ' if route == 'by path' else ''}{route}: {outcome}"
        for (what, route), outcome in outcomes.items()
    ),
)
seen = "red" if transformers.__version__.startswith("4") else "white"
assert list(outcomes.values()) == ["as upright", "as stored", "red", seen]
PYTHON

for version in 4.57.6 5.24.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        "transformers==$version" pillow==12.3.0 "numpy<2.5"
    "$folder/venv/bin/python" "$folder/routes.py" "$folder" 2> "$folder/log" || {
        cat "$folder/log"
        exit 1
    }
done
