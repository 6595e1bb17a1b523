"""Stage 6, if asked for: train experts and routers under the mask of tau."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("tune_experts")
