"""Draw chosen classes, dense beside dynamic from the same seeds: a grid, and single PNGs."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("sample")
