"""Launchers of sweeps as Hydra plugins: `hydra/launcher=processes` and `submitit_slurm`."""
