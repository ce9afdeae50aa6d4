"""The prepared copy of a cohort, laid out for reading patches."""

from pmixseg.old_paths import names_of

__getattr__ = names_of("pmixseg.data.store.store")
