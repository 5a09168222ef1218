"""Loads, checks and assembles checkpoints; a *checkpoint* is weights and their configuration in a folder."""
