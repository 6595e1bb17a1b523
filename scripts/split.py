"""Stage 4: split every FFN into experts."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("split")
