"""`triptych submit`: a run, and what comes before and after it, as jobs of a Slurm cluster.

`site` is what a cluster is like, `request` what is asked of it, `script` fills in the sbatch files of slurm/, `checks`
says beforehand what could not work, `queue` talks to sbatch and keeps RUN/job.json, `chain` puts it together.
"""
