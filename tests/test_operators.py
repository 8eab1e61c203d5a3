"""Names in schemas, which decide how operators are differentiated, and where torch's private parts are used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyflow
from pyflow._operators import OPERATORS
from pyflow._schemas import NAMED

ROOT = Path(pyflow.__file__).parent
BACKWARDS = [name for name in OPERATORS if name.endswith("_backward")]
# names that a forward passes to its backward and has not itself
MORE = {
    "affine_coupling_backward": {"shift_dtype"},
    "sde_step_backward": {"x_dtype", "score_dtype", "noise_dtype", "f64"},
    # its forward returns one flat list of four outputs per weight
    "spectral_normalize_backward": {"grads", "grad_sigmas", "sigmas"},
    "flow_program_backward": {"need_x", "need_context", "need_weights"},
}
# what a backward returns beside one gradient per argument: partial sums, or one flat list of all gradients
RETURNS = {"sde_step_backward": {"sums"}, "flow_program_backward": {"grads"}}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_shares_names_with_its_forward(name):
    backward, forward = OPERATORS[name].signature, OPERATORS[name.removesuffix("_backward")].signature
    grads = {"grad", *(f"grad_{output}" for output in forward.outputs)}
    known = {*forward.arguments, *forward.outputs}
    assert {*backward.arguments} - known - grads == MORE.get(name, set())
    of_arguments = {f"grad_{argument}" for argument in forward.arguments}
    assert {*backward.outputs} - of_arguments == RETURNS.get(name, set())


@pytest.mark.parametrize("name", OPERATORS)
def test_integers_with_a_name_are_declared(name):
    types = OPERATORS[name].signature.types
    assert all(kind == "int" for argument, kind in types.items() if argument in NAMED)


def test_only_one_file_uses_what_is_private_in_torch():
    private = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|\bfrom torch(\.\w+)*\._|\bforward_ad\b")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if private.search(line) and "benchmarks" not in path.parts and path.name != "_torch.py"
    }
    assert not found


def test_an_import_brings_nothing_that_takes_seconds():
    # dynamo is what torch.compile needs, triton what a GPU needs
    code = (
        "import sys, pyflow; print({'torch._dynamo', 'torch._inductor', 'triton', 'scipy', 'pandas'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
