"""Seeded document-like pictures with questions, cut by tile seams or left whole, and the score over them.

`pages` makes samples, `seams` measures what a seam does to a glyph, `score` counts exact matches.
"""
