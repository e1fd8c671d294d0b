"""What a model costs: bytes and time, by arithmetic alone."""
