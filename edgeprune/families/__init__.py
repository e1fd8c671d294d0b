"""Model families: one file per `model_type`, exposing `FAMILY`."""
