"""From images to label maps: sliding windows over all combinations, post-processing."""
