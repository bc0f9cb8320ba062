"""The HTTP side: OpenAI protocol in front of an engine client."""
