"""The gap between modalities in numbers."""
