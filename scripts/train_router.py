"""Stage 5: train the routers."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("train_router")
