"""Cohorts on disk: layouts, cases, names of sequences, and problems with them."""
