"""Export formats: one file per format, exposing `EXPORTER`."""
