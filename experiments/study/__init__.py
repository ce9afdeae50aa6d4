"""Studies: a plan in YAML, trainings, records, tables."""
