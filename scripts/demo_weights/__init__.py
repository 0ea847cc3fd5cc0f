"""Seeded weights of the small untrained model, one module per part; ``scripts/make_demo.py`` puts them together."""
