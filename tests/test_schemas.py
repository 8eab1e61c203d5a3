"""Every operator has the types of its schema in C++: torch's stable ABI reads the values that a call puts on its stack as
the types of the C++ function, so that another type in the schema gives other numbers or ends the process.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyflow._schemas import SCHEMAS

SOURCES = sorted((Path(__file__).parent.parent / "csrc/torch").glob("*.cpp"))
CPP = {
    "Tensor": "Tensor", "int": "int64_t", "SymInt": "int64_t", "float": "double", "bool": "bool",
    "ScalarType": "ScalarType", "str": "std::string",
}  # fmt: skip


def cpp(kind: str) -> str:
    """The C++ type of a type of a schema."""
    if kind.endswith("?"):
        return f"std::optional<{cpp(kind[:-1])}>"
    if kind.endswith("[]"):
        return f"std::vector<{cpp(kind[:-2])}>"
    return CPP.get(kind, f"a type that the table of {Path(__file__).name} has")


def list_of(text: str) -> list[str]:
    """The parts between commas that are not inside <>."""
    return [part.strip() for part in re.split(r",(?![^<]*>)", text) if part.strip()]


def of_schema(schema: str) -> tuple[list[str], list[str]]:
    """Arguments as "type name", and types of the results."""
    arguments, results = re.sub(r"\(\w!\)", "", schema).split(" -> ")
    kinds = [result.split()[0] for result in list_of(results.strip("()"))]
    return list_of(arguments.strip("()")), kinds


def plain(kind: str, aliases: dict[str, str]) -> str:
    """A C++ type by value, without namespaces of torch and aliases of the file."""
    kind = re.sub(r"\bconst\b|&|\btorch::\w+::", "", kind)
    kind = re.sub(r"\b\w+\b", lambda name: aliases.get(name[0], name[0]), kind)
    return re.sub(r"\s*([<>,])\s*", r"\1", kind.strip())


def of_function(source: str, name: str) -> tuple[list[str], str] | None:
    """Types of the arguments and of the result of the one function of that name in a C++ file."""
    aliases = dict(re.findall(r"\busing (\w+) = ([\w:<>, ]+);", source))
    pattern = rf"^(?:static |inline )?([\w:<>, ]+?)\s+{name}\(([^()]*)\)\s*{{"
    found = re.findall(pattern, source, re.MULTILINE)
    if len(found) != 1:
        return None
    result, arguments = found[0]
    # an argument that is not used has no name
    kinds = [
        re.sub(r"(?<=[\w>&])\s+\w+$", "", argument) if " " in argument else argument for argument in list_of(arguments)
    ]
    return [plain(kind, aliases) for kind in kinds], plain(result, aliases)


def differences(schemas: dict[str, str], file: str, source: str) -> dict[str, list[str]]:
    """What differs between a file of csrc/torch and the schemas: operator -> one sentence for each type."""
    source = re.sub(r"//.*", "", source)
    registered = re.findall(r'\bm\.impl\(\s*"(\w+)",\s*TORCH_BOX\(&(\w+)\)\s*\);', source)
    assert len(registered) == source.count("m.impl("), (
        f'{file}: only m.impl("name", TORCH_BOX(&function)); is understood'
    )
    return {name: list(_differing(name, schemas.get(name), file, of_function(source, f))) for name, f in registered}


def with_aliases(path: Path) -> str:
    """A C++ file, and the aliases of the headers beside it that it includes."""
    source = path.read_text()
    headers = [path.parent / name for name in re.findall(r'#include "(\w+\.h)"', source)]
    aliases = [line for header in headers for line in re.findall(r"\busing \w+ = [^;]+;", header.read_text())]
    return "\n".join([source, *aliases])


def _differing(name, schema, file, function):
    if schema is None or function is None:
        missing = "schema" if schema is None else f"definition in {file} that can be read"
        yield f"{name}: it must have one {missing}"
        return
    (arguments, results), (kinds, result) = of_schema(schema), function
    if len(arguments) != len(kinds):
        yield f"{name}: C++ must take the {len(arguments)} arguments of the schema, got {len(kinds)} in {file}"
        return
    for argument, kind in zip(arguments, kinds, strict=True):
        want = cpp(argument.split()[0])
        if kind != want:
            yield f"{name}: {argument} must be {want} in C++, got {kind} in {file}"
    wanted = [cpp(kind) for kind in results]
    want = wanted[0] if len(wanted) == 1 else f"std::tuple<{','.join(wanted)}>" if wanted else "void"
    if result != want:
        yield f"{name}: the result must be {want} in C++, got {result} in {file}"


@pytest.fixture(scope="module")
def found():
    if not SOURCES:
        pytest.skip("this folder holds the tests alone")
    each = [differences(SCHEMAS, f"csrc/torch/{path.name}", with_aliases(path)) for path in SOURCES]
    merged = {name: sentences for file in each for name, sentences in file.items()}
    assert len(merged) == sum(map(len, each)), "an operator must be registered once"
    return merged


@pytest.mark.parametrize("name", SCHEMAS)
def test_types_of_schema_and_function_agree(found, name):
    sentences = found.get(name, [f"{name}: it must be registered in csrc/torch"])
    assert not sentences, "\n".join(sentences)


def test_every_registered_function_has_a_schema(found):
    assert not {*found} - {*SCHEMAS}


SOURCE = """
using Optional = std::optional<Tensor>;
using Kinds = std::optional<ScalarType>;

std::tuple<Tensor, std::vector<Tensor>> op(Tensor x, const Optional& mask, std::vector<int64_t> sizes, bool,  // unused
                                           double scale, int64_t kind, Kinds dtype) {
}

void op_(Tensor x) {}

PYFLOW_OPERATORS(m) {
  m.impl("op", TORCH_BOX(&op));
  m.impl(
      "op_", TORCH_BOX(&op_));
}
"""
OP = "(Tensor x, Tensor? mask, SymInt[] sizes, bool flag, float scale, int kind, ScalarType? dtype) -> (Tensor y, Tensor[] z)"
BOTH = {"op": OP, "op_": "(Tensor(a!) x) -> ()"}


def test_types_that_agree():
    assert differences(BOTH, "op.cpp", SOURCE) == {"op": [], "op_": []}


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("Tensor? mask", "Tensor mask", "Tensor mask must be Tensor in C++, got std::optional<Tensor> in op.cpp"),
        ("Tensor x", "Tensor? x", "Tensor? x must be std::optional<Tensor> in C++, got Tensor in op.cpp"),
        ("Tensor x", "Tensor[] x", "Tensor[] x must be std::vector<Tensor> in C++, got Tensor in op.cpp"),
        ("float scale", "int scale", "int scale must be int64_t in C++, got double in op.cpp"),
        ("int kind", "float kind", "float kind must be double in C++, got int64_t in op.cpp"),
        ("int kind", "bool kind", "bool kind must be bool in C++, got int64_t in op.cpp"),
        ("SymInt[]", "SymInt", "SymInt sizes must be int64_t in C++, got std::vector<int64_t> in op.cpp"),
        ("bool flag", "int flag", "int flag must be int64_t in C++, got bool in op.cpp"),
        ("ScalarType?", "ScalarType", "ScalarType dtype must be ScalarType in C++, got std::optional<ScalarType> in op.cpp"),
        ("bool flag, ", "", "C++ must take the 6 arguments of the schema, got 7 in op.cpp"),
        (
            "Tensor[] z",
            "Tensor z",
            "the result must be std::tuple<Tensor,Tensor> in C++, got std::tuple<Tensor,std::vector<Tensor>> in op.cpp",
        ),
    ],
)  # fmt: skip
def test_one_type_that_differs_gets_one_sentence(old, new, sentence):
    assert old in OP
    planted = differences({**BOTH, "op": OP.replace(old, new)}, "op.cpp", SOURCE)
    assert planted == {"op": [f"op: {sentence}"], "op_": []}


def test_what_cannot_be_compared_is_no_agreement():
    assert differences({"op_": BOTH["op_"]}, "op.cpp", SOURCE)["op"] == ["op: it must have one schema"]
    other = SOURCE.replace("void op_(Tensor x) {}", "void op_(Tensor x) {}\nvoid op_(int64_t x) {}")
    unread = ["op_: it must have one definition in op.cpp that can be read"]
    assert differences(BOTH, "op.cpp", other)["op_"] == unread
    with pytest.raises(AssertionError, match=r"op.cpp: only m.impl\(.*\); is understood"):
        differences(BOTH, "op.cpp", SOURCE.replace("&op)", "&op<2>)"))
