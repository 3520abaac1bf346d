"""What ZeRO does differently where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TENSOR_OF_256_MB = """
from pathlib import Path
import torch
from finetune_trainer.zero import ask_for_huge_pages
ask_for_huge_pages()
tensor = torch.ones(64 * 2**20)
rollup = Path("/proc/self/smaps_rollup").read_text().split()
print(int(rollup[rollup.index("AnonHugePages:") + 1]))
"""


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="this kernel gives no huge pages"
)
def test_large_tensors_lie_in_huge_pages() -> None:
    done = subprocess.run([sys.executable, "-c", TENSOR_OF_256_MB], capture_output=True, text=True, check=True)
    # Of 262,144 kB; the kernel may have none left for some.
    assert int(done.stdout) > 100_000
