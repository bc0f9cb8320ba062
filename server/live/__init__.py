"""The page at /, and the events of its live view.

Reading order:

    page          the page and its files, which lie in server/web
    snapshots     GET /debug/live: the engine's blocks and sequences, as server-sent events

May import `requests`, `http`, `parsing`, `text` and the ground (server/*.py), and of the engine its
words, `engine.process` and `engine.grammar`.
"""
