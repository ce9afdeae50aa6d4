"""A synthetic glioma cohort: anatomy, contrast, tumours."""
