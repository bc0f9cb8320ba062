"""The application and the processes that run it."""
