"""The connection: bounds, parsing, admission, streams; knows no model."""
