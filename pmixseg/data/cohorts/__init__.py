"""What lies on disk: layouts, cases, names of sequences, and what is wrong with them."""
