"""The prepared copy of a cohort, laid out for reading patches."""
