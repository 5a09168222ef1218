"""Training of `fila-nano`: data, stages and the resumable run."""
