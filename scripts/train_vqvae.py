"""Stage 1: train the multi-scale VQ-VAE (or validate the given one)."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("train_vqvae")
