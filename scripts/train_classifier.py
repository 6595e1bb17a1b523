"""Train the classifier that label agreement is measured with (or validate the given one)."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("train_classifier")
