"""Thumbnails of the gallery page: `python docs/figures/gallery.py FOLDER`.

FOLDER holds what the examples drew: `for n in maml_sinusoid compare_estimators attribution; do
python examples/$n.py --output FOLDER; done`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent / "gallery"
DRAWN = ("maml_sinusoid", "compare", "attribution")
WIDTH = 480


def main(folder: str) -> None:
    """Shrink the figures to one width, in 64 colours."""
    HERE.mkdir(exist_ok=True)
    for name in DRAWN:
        with Image.open(Path(folder) / f"{name}.png") as image:
            height = round(image.height * WIDTH / image.width)
            small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
            small.quantize(64).save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
