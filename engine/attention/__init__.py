"""The attention function that transformers calls, and the layout of a step that it reads."""
