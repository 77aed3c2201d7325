"""The sweeper of studies as a Hydra plugin: `hydra/sweeper=study`."""
