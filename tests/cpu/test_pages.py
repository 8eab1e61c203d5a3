"""Large results request huge pages: one page fault per 2 MB at the first touch instead of one per 4 KB."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyflow import ops

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MB = 1 << 20


def asks_for_huge_pages(address: int) -> bool:
    """Return whether the mapping of the address was advised MADV_HUGEPAGE (proc(5), VmFlags: hg)."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(end, 16) for end in mapping.split()[0].split("-"))
        if first <= address < last:
            return "hg" in re.search(r"VmFlags:(.*)", mapping)[1].split()
    raise AssertionError("the address is not mapped")


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
def test_large_results_ask_for_huge_pages():
    # in a subprocess: memory freed by other tests may have been advised before
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def main():
    # larger than glibc's largest mmap threshold, so it gets its own mapping
    x = torch.zeros(4, 4 * MB).t()
    middle = 8 * MB
    assert not asks_for_huge_pages(x.data_ptr() + middle)
    results = {
        "a new shape": ops.normal((16 * MB,), seed=0),
        "the strides of x": ops.affine_coupling(x, x, x)[0],
        "a gradient": ops.fsq(x.requires_grad_(), (8, 5, 5, 5))[0].sum(),
    }
    results["a gradient"] = torch.autograd.grad(results["a gradient"], x)[0]
    for what, result in results.items():
        assert asks_for_huge_pages(result.data_ptr() + middle), what


if __name__ == "__main__":
    main()
