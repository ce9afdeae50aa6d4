"""Rows of results, their sidecar, and the tables made from them."""
