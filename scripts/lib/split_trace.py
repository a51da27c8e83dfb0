#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: split_trace.py TRACE.nept TRAIN.nept TEST.nept

Two thirds of the requests of each domain to TRAIN, every third one to TEST. A map solved on the one
is scored on the other, which the solver has not seen.
"""
import collections
import struct
import sys
import zlib

HEADER = struct.Struct("<8sIIIIIIQII64s")
REQUEST = struct.Struct("<IIIIQ")


def read(path):
    with open(path, "rb") as file:
        data = file.read()
    if len(data) < HEADER.size + 4 or data[:8] != b"NEPTRACE":
        sys.exit(f"split_trace.py: {path} is no trace")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        sys.exit(f"split_trace.py: {path} is damaged: its checksum differs")
    return data


def write(path, header, domains, requests, ids):
    fields = list(header)
    fields[5], fields[7] = len(requests), sum(r[1] + r[2] for r in requests)
    table, first = [], 0
    for domain, prefill, decode, flags, _ in requests:
        table.append(REQUEST.pack(domain, prefill, decode, flags, first))
        first += prefill + decode
    body = HEADER.pack(*fields) + domains + b"".join(table) + b"".join(ids)
    with open(path, "wb") as file:
        file.write(body + struct.pack("<I", zlib.crc32(body)))


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    data = read(sys.argv[1])
    header = HEADER.unpack_from(data)
    num_layers, top_k, num_requests, num_domains, id_bytes = (
        header[2], header[4], header[5], header[6], header[8])
    at = HEADER.size + 32 * num_domains
    domains = data[HEADER.size:at]
    token_bytes = num_layers * top_k * id_bytes
    ids_at = at + REQUEST.size * num_requests
    parts, seen = ([], [], [], []), collections.Counter()
    for i in range(num_requests):
        request = REQUEST.unpack_from(data, at + REQUEST.size * i)
        begin = ids_at + request[4] * token_bytes
        ids = data[begin:begin + (request[1] + request[2]) * token_bytes]
        part = 2 if seen[request[0]] % 3 == 2 else 0
        seen[request[0]] += 1
        parts[part].append(request)
        parts[part + 1].append(ids)
    for path, requests, ids in ((sys.argv[2], parts[0], parts[1]), (sys.argv[3], parts[2], parts[3])):
        write(path, header, domains, requests, ids)
        print(f"{path}: {len(requests)} of {num_requests} requests, "
              f"{sum(r[1] + r[2] for r in requests):,} tokens")


main()
