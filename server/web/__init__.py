"""The pages that the server itself serves."""
