"""The page of results: tables, figures, pictures."""

from pmixseg.old_paths import names_of

__getattr__ = names_of("pmixseg.evaluation.report.page")
