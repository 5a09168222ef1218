"""FILA: fine-grained vision-language models."""
