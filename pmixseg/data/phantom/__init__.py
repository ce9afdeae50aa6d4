"""A synthetic glioma cohort: anatomy, contrast, tumours."""

from pmixseg.old_paths import names_of

__getattr__ = names_of("pmixseg.data.phantom.cohort")
