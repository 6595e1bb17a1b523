"""What an evaluation compares, by content: reference, given samples.

A path says where something lies, not what: files are overwritten in place, folders lose pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dmoe_var.config import Config
from dmoe_var.data import DataConfig, load_data
from dmoe_var.errors import InputError
from dmoe_var.metrics.image_files import content_sha256
from dmoe_var.metrics.reference import HASHES

ABSENT = "not at hand"

_held: dict[tuple[Path | DataConfig, Path], str] | None = None


@contextmanager
def held() -> Iterator[None]:
    """Within, each content is looked at once: all points of a run are compared with one state of
    it, and a folder of a million pictures is not listed for each."""
    global _held
    outer, _held = _held, {} if _held is None else _held
    try:
        yield
    finally:
        _held = outer


def contents(config: Config, cache: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Hash of content by configuration key. What is not at hand is taken as `recorded`: records
    are read where the pictures are not."""
    places: dict[str, Path | DataConfig] = {
        key: Path(value).expanduser()
        for key, value in (
            ("fidelity.reference", config.fidelity.reference),
            ("evaluate.samples", config.evaluate.samples),
        )
        if value is not None
    }
    places.setdefault("fidelity.reference", config.data)
    return {
        key: _content(place, cache) or recorded.get(key, ABSENT) for key, place in places.items()
    }


def _content(place: Path | DataConfig, cache: Path) -> str | None:
    """None where it is not at hand, or none that can be read: measuring says what is wrong."""
    at = (place, cache)
    if _held is not None and at in _held:
        return _held[at]
    try:
        if isinstance(place, DataConfig):
            found = load_data(place)[0].key
        else:
            found = content_sha256(place, cache / HASHES)
    except (InputError, OSError):
        return None
    if _held is not None:
        _held[at] = found
    return found
