"""Presentation of results and artifacts: tables, figures, HTML reports, model cards."""
