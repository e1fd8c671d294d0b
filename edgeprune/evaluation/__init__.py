"""Scores as the papers report them: perplexity in fixed windows and zero-shot accuracy, on what ships."""
