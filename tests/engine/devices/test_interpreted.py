"""Run the CUDA path, with its kernels under Triton's interpreter."""

from pathlib import Path

import pytest

from ...interpreting import interpreted_files, require_passed

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.timeout(1200)  # the first one runs the folder, whose tests have limits of their own
@pytest.mark.parametrize("name", interpreted_files(FOLDER))
def test_the_cuda_path_under_the_interpreter(name: str) -> None:
    require_passed(FOLDER, name)
