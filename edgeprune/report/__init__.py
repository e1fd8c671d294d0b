"""The report of a run: report.json and the table on the terminal."""
