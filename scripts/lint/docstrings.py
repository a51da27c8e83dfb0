#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: docstrings.py FOLDER...: names public classes, functions and methods without a docstring, and
public functions of tensors whose docstring has no shape ("[T, H]")."""
import ast
import pathlib
import re
import sys

SHAPE = re.compile(r"\[[A-Z0-9][A-Za-z0-9_ ,*/+]*\]")


def is_public(name):
    return not name.startswith("_")


def takes_tensor(node):
    """Whether an argument is annotated as a tensor or as rows of them."""
    every = node.args.args + node.args.kwonlyargs
    return any(arg.annotation is not None and re.search(r"Tensor|Rows", ast.unparse(arg.annotation)) for arg in every)


def look(path, body, inside, found):
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or not is_public(node.name):
            continue
        name = f"{path}:{node.lineno}: {inside}{node.name}"
        text = ast.get_docstring(node)
        if text is None:
            found.append(f"{name} has no docstring")
        elif isinstance(node, ast.FunctionDef) and inside in ("Buffer.", "Normal.", "LowLatency.", "ElasticBuffer.") \
                and takes_tensor(node) and not SHAPE.search(text):
            found.append(f"{name} takes tensors, and its docstring has no shape")
        if isinstance(node, ast.ClassDef):
            look(path, node.body, node.name + ".", found)


def main():
    found, num = [], 0
    for folder in sys.argv[1:]:
        for path in sorted(pathlib.Path(folder).rglob("*.py")):
            look(path, ast.parse(path.read_text(encoding="utf-8")).body, "", found)
            num += 1
    print("\n".join(found + [f"docstrings: {num} files looked at"]))
    return 1 if found else 0


sys.exit(main())
