"""Evaluation: windows over all combinations, metrics, records, statistics, report."""
