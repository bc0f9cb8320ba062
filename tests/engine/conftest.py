"""The interpreted tests run in a process of their own: see test_interpreted.py."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["devices/interpreted"]
