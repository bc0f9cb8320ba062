"""Leave the interpreted tests to the process that interpreting.py starts for them."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["cuda/interpreted"]
