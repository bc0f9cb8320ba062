"""OpenAI's endpoints, and those that operators ask."""
