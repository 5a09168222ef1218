"""Reads corpora of conversations about pictures, in an order that is a function of a seed, and packs them into rows."""
