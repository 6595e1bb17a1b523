"""Measure one point: samples, FLOPs, fidelity."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("evaluate")
