"""Write the finished DynamicVAR as one folder to share; push it to the hub if asked."""

from _hydra import stage_main

if __name__ == "__main__":
    stage_main("export")
