"""Scans: geometry, common grids, orientation, normalisation, names of sequences, plausibility."""
