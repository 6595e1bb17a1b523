"""Put pictures inside the page, as data: URIs.

Legend: N images, R image side.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from dmoe_var.figures.sample_grid import tile

JPEG_QUALITY = 88


def png_uri(image_RR3: np.ndarray, most: int) -> str:
    """Encode one picture, uint8 (R, R, 3), as PNG, scaled down to `most` pixels per side."""
    return _uri(_shrunk(image_RR3, most), "png")


def grid_uri(images_NRR3: np.ndarray, columns: int, most: int) -> str:
    """Tile pictures, uint8 (N, R, R, 3), in rows of `columns`. They become PNG up to `most` pixels
    per side, else JPEG of that size."""
    fits = images_NRR3.shape[1] <= most
    small = [np.asarray(_shrunk(image, most)) for image in images_NRR3]
    return _uri(Image.fromarray(tile(np.stack(small), columns)), "png" if fits else "jpeg")


def _shrunk(image_RR3: np.ndarray, most: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image_RR3))
    if picture.width <= most:
        return picture
    return picture.resize((most, most), Image.Resampling.LANCZOS)


def _uri(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "png" else {"quality": JPEG_QUALITY}
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
