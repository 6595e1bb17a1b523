"""Stage: the picture after each sparse scale and the experts it took, for figures 2b and 12."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmoe_var.arrays import read_npz, write_npz
from dmoe_var.figures.expert_maps import ExpertMaps
from dmoe_var.moe.selection_config import SelectionConfig
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.graph import StageResult
from dmoe_var.stages.pictures import collect_maps
from dmoe_var.stages.work import Work
from dmoe_var.training.distributed import barrier, is_main

MAPS_FILE = "maps.npz"
CHOSEN = "chosen"


def run(work: Work) -> StageResult:
    """Writes maps.npz: of setting i, images_i uint8 (N, S, R, R, 3) and maps_i float (N, S, P, P),
    for N images and S sparse scales. about["settings"] names the settings, the chosen one first."""
    config, maps = work.config, work.config.maps
    shown = {CHOSEN: config.selection, **{f"{t:g}": SelectionConfig(tau=(t,)) for t in maps.tau}}
    labels = list(range(min(maps.images, config.var.num_classes)))
    if is_main():
        bench, arrays = Bench(work), dict[str, Any]()
        for i, selection in enumerate(shown.values()):
            found = collect_maps(work, bench, labels, selection.rules(), maps.seed)
            arrays |= {f"images_{i}": found.images, f"maps_{i}": found.maps}
        write_npz(work.folder("maps") / MAPS_FILE, arrays)
    barrier()
    settings = [{"name": name, "selection": each.text} for name, each in shown.items()]
    about = {"samples": MAPS_FILE, "settings": settings, "scales": list(config.moe.scales)}
    return StageResult({}, len(labels), about, maps.seed, config.sampling.dtype)


def stored_maps(folder: Path, number: int) -> ExpertMaps:
    """The maps of one setting; DataError where the file is missing or broken."""
    images, maps = read_npz(folder / MAPS_FILE, [f"images_{number}", f"maps_{number}"])
    return ExpertMaps(images, maps)
