"""A folder to ship: the model, its tokenizer, what is known about it, and how to run it."""
