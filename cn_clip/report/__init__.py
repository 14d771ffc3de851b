"""The report: one HTML file that shows how a run went, and what its model finds, confuses and looks at."""
