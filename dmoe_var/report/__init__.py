"""Join an experiment's records in an HTML page: one file, which asks for nothing else."""
