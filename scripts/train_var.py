"""Stage 2: train the dense VAR (or validate the given one)."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("train_var")
