"""Whole tables of both papers: `python -m recipes NAME MODEL DATASET` (see `recipes.__main__`)."""
