"""Statistics over records: paired tests, monotonicity, matching of runs."""
