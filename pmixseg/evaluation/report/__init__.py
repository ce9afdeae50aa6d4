"""The page of results: tables, figures, pictures."""
