"""Structured output: grammars compiled by llguidance, and the token masks of a step."""
