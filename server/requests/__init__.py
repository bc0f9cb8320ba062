"""From a validated body to an engine request, and from its tokens to the text of each choice."""
