"""Join what was measured into one HTML page that needs no network."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("report")
