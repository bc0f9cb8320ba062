"""Presets and the demo model, shipped as package data."""
