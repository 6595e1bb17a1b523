"""Time the sampler, beside the published one if its checkout is given."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("benchmark")
