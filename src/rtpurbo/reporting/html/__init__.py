"""The report: artifact and results as one HTML page that needs nothing else."""
