"""How the models of this project are trained: code and settings that use `fila` and that nothing in it imports."""
