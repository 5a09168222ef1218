"""Recipes that train this project's models. They import `fila`; nothing in `fila` imports them."""
