"""Training of the embedded demo, one module per part; ``scripts/train_demo.py`` runs them in order."""
