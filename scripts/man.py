#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: man.py HEADER OUTPUT_FOLDER VERSION

Man pages from include/nearep.h: one page in section 3 for each function, and nearep(7) from the
header's opening comment. The header is the only text of the contract; a page shows the comment of
its function, the structures that it takes with their comments, and its neighbours.
"""
import os
import re
import sys


def items(text):
    """(kind, text): comment, section or declaration, in the order of the header."""
    at, end = 0, len(text)
    while at < end:
        if text.startswith("/*", at):
            stop = text.index("*/", at) + 2
            comment = text[at:stop]
            title = re.match(r"/\* ---- (.*?) -+ \*/", comment)
            yield ("section", title.group(1)) if title else ("comment", comment)
            at = stop
        elif text[at] == "#":
            while True:  # a directive ends with the first line that does not end in a backslash
                stop = text.find("\n", at)
                stop = end if stop < 0 else stop
                if text[stop - 1] != "\\":
                    break
                at = stop + 1
            at = stop
        elif text[at].isspace():
            at += 1
        elif text.startswith('extern "C" {', at):
            at += len('extern "C" {')
        elif text[at] == "}":
            at += 1
        else:
            stop, depth = at, 0
            while depth or text[stop] != ";":
                if text.startswith("/*", stop):
                    stop = text.index("*/", stop) + 2
                    continue
                depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(text[stop], 0)
                stop += 1
            yield ("declaration", text[at:stop + 1])
            at = stop + 1


def plain(comment):
    """A comment's text as paragraphs and list items."""
    lines = [re.sub(r"^\s*\*? ?", "", line)
             for line in comment[2:-2].replace("\r", "").split("\n")]
    blocks, now = [], []
    for line in lines + [""]:
        line = line.strip()
        if not line or line.startswith("- "):
            if now:
                blocks.append(" ".join(now))
            now = []
        if line:
            now.append(line)
    return blocks


def escape(text):
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in ".'" else line for line in text.split("\n"))


def prose(blocks):
    out = []
    for block in blocks:
        if block.startswith("- "):
            out.append(".IP \\(bu 2\n" + escape(block[2:]))
        else:
            out.append(".PP\n" + escape(block))
    return "\n".join(out)


def code(text):
    return ".nf\n" + escape(text) + "\n.fi"


def tidy(declaration):
    """The declaration without NEP_API, wrapped as the header would wrap it."""
    text = re.sub(r"\s+", " ", declaration.replace("NEP_API ", "")).strip()
    start = text.index("(") + 1
    lines, line = [], text[:start]
    for part in re.split(r"(?<=,) ", text[start:]):
        if len(line) + len(part) > 78 and line.strip():
            lines.append(line.rstrip())
            line = " " * 4 if start > 50 else " " * start
        line += part + " "
    return "\n".join(lines + [line.rstrip()])


OBJECTS = {"comm": "a communicator", "ep": "a MoE shape on a communicator", "handle": "a handle",
           "map": "a placement map", "trace": "a routing trace", "trace_writer": "a writer of traces",
           "balance": "the online balancer", "buffer": "memory that the node maps",
           "queue": "a batch queue", "dispatch": "a dispatch", "combine": "a combine"}
VERBS = {"create": "make", "destroy": "free", "alloc": "take", "load": "read", "save": "write",
         "open": "open", "close": "close", "free": "give back", "send": "start", "recv": "complete"}


def from_name(name):
    """nep_map_destroy: "free a placement map"; nep_map_get_shape: "get shape (a placement map)"."""
    words = name.split("_")[1:]
    for length in (2, 1):
        thing = OBJECTS.get("_".join(words[:length]))
        if thing and len(words) > length:
            verb = " ".join(words[length:])
            return f"{VERBS[verb]} {thing}" if verb in VERBS else f"{verb} ({thing})"
    return " ".join(words)


def summary(function):
    """The first sentence of the function's own comment, if it is one; else what the name says."""
    text = function.blocks[0].lstrip("- ") if function.blocks else ""
    text = re.split(r"(?<=[a-z0-9)])[.:;] ", text)[0].rstrip(".")
    if not function.has_comment or len(text.split()) < 4:
        return from_name(function.name)
    return text if len(text) < 120 else text[:110].rsplit(" ", 1)[0] + " ..."


class Function:
    def __init__(self, name, declaration, blocks, section, has_comment):
        self.name, self.declaration, self.blocks = name, declaration, blocks
        self.section, self.has_comment = section, has_comment


def parse(text):
    functions, structures, head = [], {}, None
    section, comment, last = "", None, []
    for kind, value in items(text):
        if kind == "section":
            section, comment, last = value, None, []
        elif kind == "comment":
            if head is None and "SPDX" not in value:
                head = plain(value)
            comment = plain(value) if "SPDX" not in value else None
        else:
            function = re.search(r"\b(nep_\w+)\s*\(", value) if "NEP_API" in value else None
            named = re.match(r"(struct|enum) (\w+)\s*\{", value)
            if function:
                # Functions in a row under one comment share it.
                last = comment if comment is not None else last
                functions.append(Function(function.group(1), value, last, section,
                                          comment is not None))
            elif named:
                structures[named.group(2)] = (value, comment or [])
                last = comment or last
            comment = None
    return functions, structures, head or []


def used(text, structures, seen):
    for name in re.findall(r"\b(?:struct|enum) (\w+)", text):
        if name in structures and name not in seen and name != "nep_status":
            seen.append(name)
            used(structures[name][0], structures, seen)
    return seen


def page(function, functions, structures, version):
    neighbours = [f.name for f in functions
                  if f.section == function.section and f.name != function.name]
    kept = used(function.declaration, structures, [])
    out = [f'.TH {function.name} 3 "" "nearep {version}" "nearep"',
           ".SH NAME", f"{function.name} \\- {escape(summary(function))}",
           ".SH SYNOPSIS", code("#include <nearep.h>\n\n" + tidy(function.declaration)),
           ".SH DESCRIPTION", prose(function.blocks)]
    for name in kept:
        out += [f".SS {name}", prose(structures[name][1]), code(structures[name][0])]
    if "enum nep_status nep_" in function.declaration:
        out += [".SH RETURN VALUE", ".PP", escape(
            "NEP_OK (0), or a negative status; nep_last_message(3) of the calling thread then has a "
            "sentence that says what failed, where, and what to do. Outputs are written on success "
            "only.")]
    see = ", ".join(f"{n} (3)".replace(" ", "") for n in neighbours[:12])
    out += [".SH SEE ALSO", ".PP", escape("nearep(7)" + (", " + see if see else ""))]
    return "\n".join(out) + "\n"


def overview(functions, head, version):
    out = [f'.TH nearep 7 "" "nearep {version}" "nearep"', ".SH NAME",
           "nearep \\- dispatch and combine for expert\\-parallel mixture\\-of\\-experts",
           ".SH SYNOPSIS", code("#include <nearep.h>\n\ncc ... $(pkg-config --cflags --libs nearep)"),
           ".SH DESCRIPTION", prose(head), ".SH FUNCTIONS"]
    section = None
    for function in functions:
        if function.section != section:
            section = function.section
            out.append(f".SS {escape(section or 'version')}")
        out.append(f".TP\n.BR {function.name} (3)\n{escape(summary(function))}")
    return "\n".join(out) + "\n"


def main():
    header, folder, version = sys.argv[1:4]
    with open(header, encoding="utf-8") as file:
        functions, structures, head = parse(file.read())
    if not functions:
        sys.exit(f"man.py: no function found in {header}")
    for section in ("man3", "man7"):
        os.makedirs(os.path.join(folder, section), exist_ok=True)
    for function in functions:
        with open(os.path.join(folder, "man3", function.name + ".3"), "w", encoding="utf-8") as out:
            out.write(page(function, functions, structures, version))
    with open(os.path.join(folder, "man7", "nearep.7"), "w", encoding="utf-8") as out:
        out.write(overview(functions, head, version))


main()
