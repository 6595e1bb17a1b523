"""Stage 3: ReLUfication and fine-tuning with the Hoyer loss."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("sparsify")
