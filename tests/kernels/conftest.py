"""Leave the interpreted tests to the process that interpreting.py starts for them."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["cuda/interpreted"]

# As engine.devices.choose does on a GPU: Triton 3.9 warns if it is not said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
