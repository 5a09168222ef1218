"""Trains any FILA on Hugging Face Trainer and accelerate: recipes, data, packing, checkpoints that lose nothing."""
