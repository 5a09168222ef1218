"""Everything that a GPU is wanted for, in three runs of nine minutes and one more for the rest: `make gpu`."""
