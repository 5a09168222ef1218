"""Loads and checks checkpoints; a *checkpoint* is weights and their configuration in a folder."""
