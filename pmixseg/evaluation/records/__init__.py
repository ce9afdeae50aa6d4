"""Rows of results, their sidecar, and the tables made from them."""

from pmixseg.old_paths import names_of

__getattr__ = names_of("pmixseg.evaluation.records.records")
