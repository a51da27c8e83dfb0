#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: generate_abi.py NEAREP_H OUT: the ctypes declarations of nearep.h, as a Python module.

The header is the one description of the interface; this reads it and stops at anything that it does
not know, so that a declaration is right or the build fails. Pointers become c_void_p (addresses are
passed as integers, which costs least), texts c_char_p.
"""
import re
import sys

SCALARS = {
    "uint8_t": "c_uint8", "int32_t": "c_int32", "uint32_t": "c_uint32", "uint64_t": "c_uint64",
    "size_t": "c_size_t", "float": "c_float", "double": "c_double", "int": "c_int", "char": "c_char",
    "int64_t": "c_int64", "uint16_t": "c_uint16",
}


def strip(text):
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    return re.sub(r"\s+", " ", text.replace("NEP_API ", "").replace('extern "C" {', ""))


def constants(text):
    """#define NAME number"""
    for name, value in re.findall(r"^#define (NEP_[A-Z_0-9]+) (\d+)u?\b", text, flags=re.M):
        yield name, int(value)


def kind_of(words, stars, names):
    base = " ".join(word for word in words.split() if word != "const")
    if stars:
        return "c_char_p" if base == "char" and stars == 1 else "c_void_p"
    if base.startswith("enum "):
        return "c_int"
    if base.startswith("struct "):
        name = base[len("struct "):]
        if name not in names:
            raise SystemExit(f"generate_abi: struct {name} is used by value before its members")
        return name
    if base not in SCALARS:
        raise SystemExit(f"generate_abi: type '{words}' is not known")
    return SCALARS[base]


def member(text, names):
    """'const uint32_t *a' or 'char b[32]' -> (name, ctypes type)"""
    if "(*" in text:
        return re.search(r"\(\*(\w+)\)", text).group(1), "c_void_p"
    found = re.fullmatch(r"(.*?)(\**)\s*(\w+)(?:\[(\d+)\])?", text.strip())
    if not found:
        raise SystemExit(f"generate_abi: member '{text}'")
    words, stars, name, count = found.groups()
    star_count = len(stars) + words.count("*")
    kind = kind_of(words.replace("*", " "), star_count, names)
    return name, f"{kind} * {count}" if count else kind


def split_members(body):
    return [part.strip() for part in body.split(";") if part.strip()]


def generate(header):
    text = strip(header)
    out = ['"""ctypes declarations of nearep.h; made from it, not to be edited."""',
           "from ctypes import (Structure, c_char, c_char_p, c_double, c_float, c_int, c_int32, c_int64,",
           "                    c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p)", ""]
    out += [f"{name} = {value}" for name, value in constants(header)]
    for body in re.findall(r"\benum \w+ \{(.*?)\}", text):
        following = 0
        for entry in filter(None, (part.strip() for part in body.split(","))):
            name, _, value = entry.partition("=")
            following = int(value, 0) if value.strip() else following
            out.append(f"{name.strip()} = {following}")
            following += 1
    names = set()
    for name, body in re.findall(r"\bstruct (\w+) \{(.*?)\} ?;", text):
        out += ["", "", f"class {name}(Structure):", "    _fields_ = ["]
        for part in split_members(body):
            first, *more = [piece.strip() for piece in part.split(",")] if "(" not in part else [part]
            field, kind = member(first, names)
            out.append(f'        ("{field}", {kind}),')
            out += [f'        ("{other}", {kind}),' for other in more]
        out.append("    ]")
        names.add(name)
    flat = re.sub(r"\b(struct|enum) \w+ \{.*?\} ?;", "", text)
    out += ["", "", "FUNCTIONS = {"]
    num = 0
    for result, stars, name, args in re.findall(
            r"([\w ]+?) (\*?)(nep_\w+)\(([^()]*(?:\([^()]*\)[^()]*)*)\);", flat):
        kinds = [] if args.strip() == "void" else [member(arg, names)[1] for arg in args.split(",")]
        result = result.strip()
        kind = "None" if result == "void" and not stars else kind_of(result, len(stars), names)
        out.append(f'    "{name}": ({kind}, [{", ".join(kinds)}]),')
        num += 1
    if num != len(re.findall(r"^NEP_API ", header, flags=re.M)):
        raise SystemExit("generate_abi: a function was not understood")
    out += ["}", ""]
    return "\n".join(out)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        text = generate(file.read())
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
