"""Scans: reading NIfTI, geometry, common grids, orientation, plausibility, results."""
