"""A model's text as a message: reasoning, content, tool calls."""
