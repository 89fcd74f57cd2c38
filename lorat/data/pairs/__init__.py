"""Pairs of a template and a search region, each a pure function of seed and number."""
