"""Models, data and settings that people train: from a laptop to the four configurations of MSign (arXiv 2602.01734)."""
