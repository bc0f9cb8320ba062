"""The presets and the demo model, which are shipped as package data."""
