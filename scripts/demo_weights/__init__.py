"""Seeded weights of the embedded demo, one module per part; ``scripts/make_demo.py`` puts them together."""
