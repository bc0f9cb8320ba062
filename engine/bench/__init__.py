"""The engine alone, timed in process: `python -m quire.engine.bench`."""
