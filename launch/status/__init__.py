"""How a run is doing, from the files of its run directory, plus what Slurm says where it is there.

Only reads. Imports no torch, and costs the same at a million steps as at a hundred.
"""
