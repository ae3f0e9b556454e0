"""Results and artifacts, shown: tables, pictures in the terminal, model cards."""
