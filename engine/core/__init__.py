"""The engine's loop. Start reading here."""
