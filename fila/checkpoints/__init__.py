"""Loading, checking and assembling checkpoints: a *checkpoint* is weights and their configuration in a folder."""
