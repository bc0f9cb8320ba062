"""The body of a Llama-shaped model, flattened into one function."""
