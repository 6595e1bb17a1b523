"""Build the page itself: template, style, scripts and data in one HTML text.

It asks the network for nothing: a policy in its head forbids it, and all pictures are data: URIs.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from dmoe_var.report.microscope import STEPS, Recording
from dmoe_var.report.pictures import png_uri

SCRIPTS = ("tools.js", "curve.js", "tables.js", "microscope.js", "main.js")


def build(title: str, data: Mapping[str, Any]) -> str:
    """Build the whole page. `data` is what its scripts read; nothing in it becomes markup."""
    text = _file("page.html")
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = "\n".join(_file(name) for name in SCRIPTS)
    text = text.replace("<!--title-->", html.escape(title), 1)
    text = text.replace("/*style*/", _file("style.css"), 1)
    return text.replace("/*data*/", content, 1).replace("/*scripts*/", scripts, 1)


def _file(name: str) -> str:
    return (resources.files("dmoe_var.report") / "page" / name).read_text(encoding="utf-8")


def packed(recording: Recording, most_pixels: int) -> dict[str, Any]:
    """Pack a recording as the page reads it: by scale, little-endian 16-bit numbers in base64.

    An error is stored in steps of `error_step`, which is the largest error over 65535.
    """
    largest = max(float(errors.max()) for errors in recording.errors.values())
    step = largest / STEPS or 1.0
    return {
        "error_step": step,
        "ratios": {str(si): _base64(ratios) for si, ratios in recording.ratios.items()},
        "errors": {
            str(si): _base64(np.rint(errors / step)) for si, errors in recording.errors.items()
        },
        "after": {str(si): png_uri(image, most_pixels) for si, image in recording.pictures.items()},
    }


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.astype("<u2").tobytes()).decode()
