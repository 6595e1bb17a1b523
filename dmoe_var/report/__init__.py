"""The HTML page that joins an experiment's records: one file, which asks for nothing else."""
