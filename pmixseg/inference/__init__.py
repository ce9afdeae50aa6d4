"""Use trained models: segment scans, import published weights, export models."""
