"""Hostile files of every kind that poolreg reads, each under a name, and a child that meets them.

`CASES[family][name]` is a `Case`: a function that writes a file (or something worse) to a path,
and what the refusal must say. The families: weights, indexes, configs, tokenizers (in a model
folder), segments (in a journal), formats (a pool's FORMAT) and recipes. Run as a script this
module is a child process: it runs the command lines that it reads, one JSON list a line, through
the command `poolreg`, and answers each with the exit code, what was said and its peak memory.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"
DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """Something hostile at a path, words of the refusal, and the exit code it ends with."""

    make: Callable[[Path], object]
    words: str
    code: int = 1


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _sparse(start: bytes, size: int) -> Callable[[Path], object]:
    """A file that begins so and is that large, without taking room on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def _repeated(start: bytes, item: bytes, count: int, end: bytes = b"") -> Callable[[Path], object]:
    """A file of very many equal pieces, written a megabyte at a time."""

    def make(path: Path) -> None:
        at_once = max(1, (1 << 20) // len(item))
        with open(path, "wb") as file:
            file.write(start)
            for done in range(0, count, at_once):
                file.write(item * min(at_once, count - done))
            file.write(end)

    return make


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


# -- weights ----------------------------------------------------------------------------------


def safetensors(header: Any, payload: bytes = b"") -> bytes:
    """A file of this header (JSON text, or what becomes it), with its right length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _one(text: str, payload: bytes = bytes(4)) -> Callable[[Path], object]:
    """A file of one tensor `a` with its entry spelled out."""
    return _bytes(safetensors(f'{{"a":{text}}}'.encode(), payload))


def _two(first: list[int], second: list[int], size: int) -> Callable[[Path], object]:
    entries = {"a": tensor(offsets=first), "b": tensor(offsets=second)}
    return _bytes(safetensors(entries, bytes(size)))


def _padded(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": print}, protocol=2))


_MEMBER = '"dtype":"F32","shape":[1]'
_TRUST = "model.safetensors is not a safetensors file that can be trusted: "
_A, _B = _TRUST + "tensor 'a' ", _TRUST + "tensor 'b' "
_MANY = 32 << 20  # bytes: the longest header

WEIGHTS = {
    "nothing in it": Case(_bytes(b""), "model.safetensors is too short"),
    "seven bytes": Case(_bytes(b"\x10" * 7), "model.safetensors is too short"),
    "a header of 1 GB that is not there": Case(
        _bytes(_padded(1 << 30, b"{}")), "model.safetensors announces a header"),
    "a header of 1 GB that is there": Case(
        _sparse(_padded(1 << 30, b'{"a":'), (1 << 30) + 8), "model.safetensors announces a header"),
    "a header of 2**64-1": Case(_bytes(b"\xff" * 64), "model.safetensors announces a header"),
    "a header longer than the file": Case(
        _bytes(_padded(500, b"{}")), "model.safetensors is truncated"),
    "a header of no bytes": Case(_bytes(bytes(16)), _TRUST + "the header is not a JSON object"),
    "a list as header": Case(_bytes(safetensors([])), _TRUST + "the header is not a JSON object"),
    "a space before the header": Case(_bytes(safetensors(b" {}")), _TRUST + "the header is not"),
    "a header in UTF-16": Case(
        _bytes(safetensors("{}".encode("utf-16-le"))), _TRUST + "the header is not"),
    "a header that is not UTF-8": Case(
        _bytes(safetensors(b'{"\xff\xfe":1}')), _TRUST + "the header is not valid JSON"),
    "half of a header": Case(_bytes(safetensors(b'{"a":{"dty')), _TRUST + "the header is not valid"),
    "100,000 open brackets": Case(
        _bytes(safetensors(b'{"a":' + b"[" * DEEP)), _TRUST + "the header is not valid JSON"),
    "100,000 open braces": Case(
        _bytes(safetensors(b'{"a":' * DEEP)), _TRUST + "the header is not valid JSON"),
    "100,001 tensors": Case(
        lambda path: path.write_bytes(safetensors(
            dict.fromkeys(map(hex, range(100_001)), tensor(shape=[0], offsets=[0, 0])))),
        _TRUST + "the header lists 100001 tensors"),
    "11 million lists": Case(
        _repeated(_padded(_MANY, b'{"a":[  '), b"[],", (_MANY - 8) // 3, b"  "),
        _TRUST + "the header holds more than"),
    "4 million objects": Case(
        _repeated(_padded(_MANY, b'{"a":[  '), b'{"":0 },', (_MANY - 8) // 8),
        _TRUST + "the header holds more than"),
    "3 million keys": Case(
        lambda path: path.write_bytes(
            safetensors(b"{" + b",".join(b'"%x":0' % n for n in range(2_900_000)) + b"}")),
        _TRUST + "the header holds more than"),
    "negative offsets": Case(_one(f'{{{_MEMBER},"data_offsets":[-4,0]}}'), _TRUST + "the header holds the number -4"),
    "offsets backwards": Case(_one(f'{{{_MEMBER},"data_offsets":[4,0]}}'), _A + "has no proper"),
    "offsets of 20 digits": Case(
        _one(f'{{{_MEMBER},"data_offsets":[0,18446744073709551620]}}'), _TRUST + "the header holds the number"),
    "offsets of 5,000 digits": Case(
        _one(f'{{{_MEMBER},"data_offsets":[0,{"9" * 5000}]}}'), _TRUST + "the header holds the number"),
    "offsets past the end": Case(
        _one('{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}'), _TRUST + "the file is truncated"),
    "three offsets": Case(_one(f'{{{_MEMBER},"data_offsets":[0,4,8]}}'), _A + "has no proper"),
    "offsets as text": Case(_one(f'{{{_MEMBER},"data_offsets":["0","4"]}}'), _A + "has no proper"),
    "tensors that overlap": Case(_two([0, 4], [2, 6], 6), _B + "overlaps another"),
    "two tensors in one place": Case(_two([0, 4], [0, 4], 4), _B + "overlaps another"),
    "a gap between tensors": Case(_two([0, 4], [8, 12], 12), _B + "leaves a hole"),
    "tensors backwards with a gap": Case(_two([8, 12], [0, 4], 12), _A + "leaves a hole"),
    "a gap before all": Case(_two([4, 8], [8, 12], 12), _A + "leaves a hole"),
    "bytes after the end": Case(_bytes(safetensors({"a": tensor()}, bytes(5))), _TRUST + "the file is too long"),
    "a byte too few": Case(_bytes(safetensors({"a": tensor()}, bytes(3))), _TRUST + "the file is truncated"),
    "a shape of 2**64 and more": Case(
        _one('{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}', b""), _A + "is impossibly large"),
    "a shape whose product is 0 in 64 bits": Case(
        _one('{"dtype":"U8","shape":[9223372036854775808,2],"data_offsets":[0,0]}', b""), _A + "is impossibly large"),
    "a zero that hides a giant shape": Case(
        _one('{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}', b""), _A + "is impossibly large"),
    "a million dimensions": Case(
        _one('{"dtype":"F32","shape":[' + "1," * 999_999 + '1],"data_offsets":[0,4]}'), _A + "has no proper shape"),
    "a negative shape": Case(_one('{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}'), _TRUST + "the header holds the number -1"),
    "a shape of halves": Case(_one('{"dtype":"F32","shape":[0.5,2],"data_offsets":[0,4]}'), _TRUST + "the header holds the number 0.5"),
    "true as a shape": Case(_one('{"dtype":"F32","shape":[true],"data_offsets":[0,4]}'), _A + "has no proper shape"),
    "NaN as a shape": Case(_one('{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}'), _TRUST + "the header holds the number NaN"),
    "Infinity as an offset": Case(_one(f'{{{_MEMBER},"data_offsets":[0,Infinity]}}'), _TRUST + "the header holds the number Infinity"),
    "1e999 as an offset": Case(_one(f'{{{_MEMBER},"data_offsets":[0,1e999]}}'), _TRUST + "the header holds the number 1e999"),
    "a dtype of the future": Case(_one('{"dtype":"F4","shape":[1],"data_offsets":[0,4]}'), _A + "has the dtype 'F4'"),
    "a dtype of 1 MB": Case(_bytes(safetensors({"a": tensor(dtype="F" * (1 << 20))}, bytes(4))), _A + "has the dtype"),
    "a dtype that is a list": Case(_one('{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}'), _A + "has the dtype"),
    "a tensor without a shape": Case(_one('{"dtype":"F32","data_offsets":[0,4]}'), _A + "needs exactly"),
    "a tensor with a field more": Case(_one(f'{{{_MEMBER},"data_offsets":[0,4],"code":"x"}}'), _A + "needs exactly"),
    "a tensor that is null": Case(_one("null"), _A + "needs exactly"),
    "one key twice": Case(
        _bytes(safetensors(b'{"a":{%b,"data_offsets":[0,4]},"a":{%b,"data_offsets":[0,4]}}' % ((_MEMBER.encode(),) * 2), bytes(4))),
        _TRUST + "the header has the key 'a' twice"),
    "one field twice": Case(
        _one(f'{{{_MEMBER},"data_offsets":[0,4],"shape":[1]}}'), _TRUST + "the header has the key 'shape' twice"),
    "a name that moves the cursor": Case(
        _bytes(safetensors({ESCAPES: tensor()}, bytes(4))), _TRUST + r"tensor '\x1b[2J"),
    "a name with a line end": Case(_bytes(safetensors({"a\nok": tensor()}, bytes(4))), _TRUST + r"tensor 'a\nok'"),
    "a name with a NUL": Case(_bytes(safetensors({"a\0": tensor()}, bytes(4))), _TRUST + r"tensor 'a\x00'"),
    "a name of half a character": Case(_bytes(safetensors({"\ud800": tensor()}, bytes(4))), _TRUST + r"tensor '\ud800'"),
    "a name of 1 MB": Case(_bytes(safetensors({"a" * (1 << 20): tensor()}, bytes(4))), _TRUST + "tensor 'aaa"),
    "a name of nothing": Case(_bytes(safetensors({"": tensor()}, bytes(4))), _TRUST + "tensor ''"),
    "metadata that is a list": Case(_bytes(safetensors({"__metadata__": []})), _TRUST + "__metadata__ is not"),
    "metadata of numbers": Case(_bytes(safetensors({"__metadata__": {"step": 3}})), _TRUST + "__metadata__ holds something"),
    "metadata in metadata": Case(_bytes(safetensors({"__metadata__": {"a": {"b": "c"}}})), _TRUST + "__metadata__ holds something"),
    "no tensors at all": Case(_bytes(safetensors({})), "hold no tensors"),
    "values that are not finite": Case(_bytes(safetensors({"a": tensor()}, b"\0\0\xc0\x7f")), "tensor a of model.safetensors"),
    "a pickle": Case(_bytes(pickle.dumps({"a": print}, protocol=4)), "model.safetensors announces a header"),
    "a zip, as torch writes it": Case(_zip, "model.safetensors announces a header"),
    "an HTML page": Case(_bytes(b"<!DOCTYPE html><title>404</title>" * 9), "model.safetensors announces a header"),
    "a Git LFS pointer": Case(
        _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"),
        "model.safetensors announces a header"),
    "a folder": Case(Path.mkdir, "model.safetensors is not a regular file"),
    "a pipe": Case(os.mkfifo, "model.safetensors is not a regular file"),
    "a link to a device": Case(_link("/dev/zero"), "model.safetensors is not a regular file"),
    "a link to nowhere": Case(_link("nowhere"), "model.safetensors cannot be read"),
    "a link to itself": Case(_link("model.safetensors"), "model.safetensors cannot be read"),
    "a link to a text": Case(_link("config.json"), "model.safetensors announces a header"),
}  # fmt: skip


# -- indexes, configs and tokenizers ------------------------------------------------------------


def _index(placed: Any, **more: Any) -> Callable[[Path], object]:
    return _bytes(json.dumps({"metadata": {}, "weight_map": placed, **more}).encode())


_INDEX = "model.safetensors.index.json"
_PLAIN = "which is not a plain file name"

INDEXES = {
    "a file two folders up": Case(_index({"w0": "../../model.safetensors"}), f"{_INDEX} names the weights file '../../model.safetensors', {_PLAIN}"),
    "an absolute path": Case(_index({"w0": "/etc/passwd.safetensors"}), _PLAIN),
    "a path of another system": Case(_index({"w0": "..\\model.safetensors"}), _PLAIN),
    "a folder within": Case(_index({"w0": "sub/model.safetensors"}), _PLAIN),
    "a pickle": Case(_index({"w0": "pytorch_model.bin"}), _PLAIN),
    "a name with a NUL": Case(_index({"w0": "model\0.safetensors"}), _PLAIN),
    "a name that moves the cursor": Case(_index({"w0": ESCAPES + ".safetensors"}), _PLAIN),
    "a number as file": Case(_index({"w0": 3}), _PLAIN),
    "a list as file": Case(_index({"w0": ["model.safetensors"]}), _PLAIN),
    "a file that is missing": Case(_index({"w0": "model-2.safetensors"}), "model-2.safetensors is missing"),
    "a name of 5,000 letters": Case(_index({"w0": "x" * 5000 + ".safetensors"}), "is incomplete"),
    "a tensor that no file holds": Case(_index({"w0": "model.safetensors", "w9": "model.safetensors"}), "tensor 'w9' is missing"),
    "a tensor left out": Case(_index({"w9": "model.safetensors"}), "tensor 'w0' of model.safetensors is not there by"),
    "nothing placed": Case(_index({}), f"{_INDEX} has no weight_map"),
    "a list of files": Case(_index(["model.safetensors"]), f"{_INDEX} has no weight_map"),
    "no map": Case(_bytes(b'{"metadata": {}}'), f"{_INDEX} has no weight_map"),
    "larger than any": Case(_sparse(b"{", 1 << 30), f"{_INDEX} is larger than"),
    "11 million lists": Case(
        _repeated(b'{"weight_map":{"w0":"model.safetensors"},"x":[', b"[],", 11_000_000, b"0]}"), f"{_INDEX} holds more than"),
}  # fmt: skip


def _json_cases(name: str, valid: str, cap: int) -> dict[str, Case]:
    """What any JSON file of a model folder may be; `valid` are members that make it a real one."""
    head = valid.encode() + b","
    return {
        "nothing in it": Case(_bytes(b""), f"{name} is not valid JSON"),
        "half of it": Case(_bytes(b'{"model_ty'), f"{name} is not valid JSON"),
        "a list": Case(_bytes(b"[1]"), f"{name} holds a JSON list"),
        "null": Case(_bytes(b"null"), f"{name} holds a JSON NoneType"),
        "a byte order mark": Case(_bytes(b"\xef\xbb\xbf{" + valid.encode() + b"}"), f"{name} is not valid JSON"),
        "UTF-16": Case(_bytes(("{" + valid + "}").encode("utf-16")), f"{name} is not valid JSON"),
        "bytes that are no text": Case(_bytes(b'{"a":"\xff\xfe"}'), f"{name} is not valid JSON"),
        "half a character": Case(_bytes(b"{" + head + b'"a":"\\ud800"}'), f"{name} is not valid JSON"),
        "NaN": Case(_bytes(b"{" + head + b'"a":NaN}'), f"{name} is not valid JSON (NaN is"),
        "-Infinity": Case(_bytes(b"{" + head + b'"a":-Infinity}'), f"{name} is not valid JSON (-Infinity is"),
        "1e999": Case(_bytes(b"{" + head + b'"a":1e999}'), f"{name} is not valid JSON (1e999 is"),
        "a number of 5,000 digits": Case(_bytes(b"{" + head + b'"a":' + b"9" * 5000 + b"}"), f"{name} is not valid JSON"),
        "one key twice": Case(_bytes(b"{" + head + b'"a":1,"a":2}'), f"{name} is not valid JSON (the key 'a' stands there twice"),
        "100,000 open brackets": Case(_bytes(b'{"a":' + b"[" * DEEP), f"{name} is not valid JSON"),
        "100,000 open braces": Case(_bytes(b'{"a":' * DEEP), f"{name} is not valid JSON"),
        "200 levels": Case(_bytes(b"{" + head + b'"a":' + b"[" * 200 + b"]" * 200 + b"}"), f"{name} is nested more than"),
        "a string of 100 MB": Case(_repeated(b"{" + head + b'"a":"', b"x" * (1 << 20), 100, b'"}'), f"{name} is larger than"),
        "a file of 4 GB": Case(_sparse(b"{" + head, 4 << 30), f"{name} is larger than"),
        "nothing but lists": Case(_repeated(b"{" + head + b'"a":[', b"[],", cap // 4, b"0]}"), f"{name} holds more than"),
        "NUL bytes": Case(_bytes(bytes(1000)), f"{name} is not valid JSON"),
        "a folder": Case(Path.mkdir, f"{name} is not a regular file"),
        "a pipe": Case(os.mkfifo, f"{name} is not a regular file"),
        "a link to a device": Case(_link("/dev/zero"), f"{name} is not a regular file"),
    }  # fmt: skip


def _config(**more: Any) -> Callable[[Path], object]:
    return _bytes(json.dumps({"model_type": "llama", **more}).encode())


_ASKS = "config.json asks to run code of its author"

CONFIGS = _json_cases("config.json", '"model_type":"llama"', 4 << 20) | {
    "no model_type": Case(_bytes(b"{}"), "config.json names no model_type"),
    "a number as model_type": Case(_config(model_type=3), "config.json names no model_type"),
    "code of its own": Case(_config(auto_map={"AutoModel": "evil.Model"}), _ASKS),
    "code of its own, deep inside": Case(_config(a=[{"b": {"auto_map": {"AutoConfig": "x.X"}}}]), _ASKS),
    "kernels of a stranger": Case(_config(attn_implementation="someone/kernels"), _ASKS),
    "quantised": Case(_config(quantization_config={"bits": 4}), "are quantised"),
    "quantised inside": Case(_config(text_config={"quantization_config": {"bits": 4}}), "are quantised"),
    "a link to nowhere": Case(_link("nowhere"), "has no config.json"),
}  # fmt: skip

TOKENIZERS = _json_cases("tokenizer.json", '"model":{"type":"BPE"}', 64 << 20)


# -- segments of a journal; the words are those of `poolreg verify` -----------------------------

FIELDS = {"v": 1, "kind": "name", "id": "a" * 64, "at": "2026-01-02T03:04:05.000006Z",
          "body": {}, "objects": {}}  # fmt: skip


def line(data: Any) -> bytes:
    """A journal line with its right checksum, of JSON text or of what becomes it."""
    text = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    return b"%08x %s\n" % (binascii.crc32(text), text)


def _line(**changed: Any) -> Callable[[Path], object]:
    return _bytes(line(FIELDS | changed))


def _giant(path: Path) -> None:
    """A line of a little under 64 MiB that is nothing but lists."""
    start, end = b'{"at":"","body":{"x":[', b'0]},"id":"x","kind":"x","objects":{},"v":1}'
    text = start + b"[]," * ((63 << 20) // 3) + end
    path.write_bytes(line(text))


_SAID = {"space": "model", "name": "x", "target": "b" * 64, "parent": None}
_NAMED = "hostile.jsonl"
_BAD = f"journal/{_NAMED}"

SEGMENTS = {
    "a checksum that is wrong": Case(_bytes(b"00000000 {}\n"), _NAMED, 3),
    "no checksum": Case(_bytes(b'{"v":1}\n'), _NAMED, 3),
    "a checksum in capitals": Case(lambda p: p.write_bytes(line(FIELDS)[:8].upper().replace(b"0", b"O") + line(FIELDS)[8:]), _NAMED, 3),
    "NUL bytes": Case(_bytes(bytes(4096) + b"\n"), _NAMED, 3),
    "a line that is torn in the middle": Case(_bytes(line(FIELDS)[:40] + b"\n" + line(FIELDS)), _NAMED, 3),
    "a line that lacks its end before another": Case(_bytes(line(FIELDS)[:-1] + line(FIELDS)), _NAMED, 3),
    "a line of 65 MiB": Case(_repeated(b"", b"x" * (1 << 20), 65, b"\n"), _NAMED, 3),
    "a text that is no JSON": Case(_bytes(line(b"{")), _NAMED, 3),
    "a list": Case(_bytes(line([])), _NAMED, 3),
    "100,000 open brackets": Case(_bytes(line(b'{"v":1,"body":' + b"[" * DEEP)), _NAMED, 3),
    "100,000 levels": Case(_bytes(line(b'{"v":1,"body":' + b"[" * DEEP + b"]" * DEEP + b"}")), _NAMED, 3),
    "bytes that are no text": Case(_bytes(line(b'{"v":"\xff"}')), _NAMED, 3),
    "a number of 5,000 digits": Case(_bytes(line(b'{"v":' + b"9" * 5000 + b"}")), _NAMED, 3),
    "another version": Case(_line(v=2), _BAD, 3),
    "a version of 1 MB": Case(_line(v="9" * (1 << 20)), _BAD, 3),
    "a version that moves the cursor": Case(_line(v=ESCAPES), _BAD, 3),
    "true as version": Case(_line(v=True), _BAD, 3),
    "no fields": Case(_bytes(line({})), _NAMED, 3),
    "a list as body": Case(_line(body=[]), _NAMED, 3),
    "a number as id": Case(_line(id=3), _NAMED, 3),
    "null as kind": Case(_line(kind=None), _NAMED, 3),
    "a list as objects": Case(_line(objects=["a" * 64]), _NAMED, 3),
    "a body that lacks everything": Case(_line(), _NAMED, 3),
    "a model that lacks everything": Case(_line(kind="model"), _NAMED, 3),
    "an evaluation that lacks everything": Case(_line(kind="evaluation"), _NAMED, 3),
    "a name that is a list": Case(_line(body={**_SAID, "name": ["x"]}), _NAMED, 3),
    "a name that is an object": Case(_line(body={**_SAID, "name": {"x": 1}}), _NAMED, 3),
    "a name of half a character": Case(_bytes(line(json.dumps(FIELDS | {"body": {**_SAID, "name": "\ud800"}}).encode())), r"model \ud800", 3),
    "a time that is none": Case(_line(at="yesterday", body=_SAID), "model x", 3),
    "a time with a year too many": Case(_line(at="999999-01-01T00:00:00.000000Z", body=_SAID), "model x", 3),
    "an object under no digest": Case(_line(kind="x", objects={"../../etc/passwd": 3}), _NAMED, 3),
    "an object of negative size": Case(_line(kind="x", objects={"a" * 64: -1}), _NAMED, 3),
    "an object of 2**70 bytes": Case(_line(kind="x", objects={"a" * 64: 2**70}), "object " + "a" * 64, 3),
    "an object of half a byte": Case(_line(kind="x", objects={"a" * 64: 0.5}), _NAMED, 3),
    "an object of so many bytes in words": Case(_line(kind="x", objects={"a" * 64: "three"}), _NAMED, 3),
    "an object whose size is true": Case(_line(kind="x", objects={"a" * 64: True}), _NAMED, 3),
    "an object whose size is null": Case(_line(kind="x", objects={"a" * 64: None}), _NAMED, 3),
    "an object whose size is a list": Case(_line(kind="x", objects={"a" * 64: [1]}), _NAMED, 3),
    "an object whose size is NaN": Case(_bytes(line(json.dumps(FIELDS | {"kind": "x", "objects": {"a" * 64: float("nan")}}).encode())), _NAMED, 3),
    "22 million lists in one line": Case(_giant, _NAMED, 3),
}  # fmt: skip


# -- FORMAT -------------------------------------------------------------------------------------


def _format(**fields: Any) -> Callable[[Path], object]:
    return _bytes(json.dumps(fields).encode())


_UUID = "00000000-0000-4000-8000-000000000000"
_NONE, _OTHER = "FORMAT is not the FORMAT file of a pool", "; this poolreg reads format 1"

FORMATS = {
    "nothing in it": Case(_bytes(b""), _NONE, 3),
    "half of it": Case(_bytes(b'{"format":1,'), _NONE, 3),
    "a list": Case(_bytes(b"[1]"), _NONE, 3),
    "a number": Case(_bytes(b"1"), _NONE, 3),
    "no id": Case(_format(format=1), _NONE, 3),
    "no format": Case(_format(id=_UUID), _NONE, 3),
    "format 0": Case(_format(format=0, id=_UUID), _OTHER),
    "format 2": Case(_format(format=2, id=_UUID), _OTHER),
    "format -1": Case(_format(format=-1, id=_UUID), _OTHER),
    "format 2**64": Case(_format(format=2**64, id=_UUID), _OTHER),
    "format as text": Case(_format(format="1", id=_UUID), _OTHER),
    "format as truth": Case(_format(format=True, id=_UUID), _OTHER),
    "format 1.0": Case(_format(format=1.0, id=_UUID), _OTHER),
    "format NaN": Case(_bytes(b'{"format":NaN,"id":"x"}'), _NONE, 3),
    "an id of half a character": Case(_bytes(b'{"format":1,"id":"\\ud800"}'), _NONE, 3),
    "a wrong checksum": Case(_format(format=1, id=_UUID, crc32="00000000"), _NONE, 3),
    "a field more": Case(_format(format=1, id=_UUID, more=1), _NONE, 3),
    "format as a list": Case(_format(format=[1], id=_UUID), _OTHER),
    "a format that moves the cursor": Case(_format(format=ESCAPES, id=_UUID), _OTHER),
    "a format of 4,000 digits": Case(_bytes(b'{"format":' + b"9" * 4000 + b',"id":"x"}'), _OTHER),
    "4,000 open brackets": Case(_bytes(b"[" * 4000), _NONE, 3),
    "a file of 4 GB": Case(_sparse(b"{", 4 << 30), "FORMAT is larger than", 3),
    "NUL bytes": Case(_bytes(bytes(100)), _NONE, 3),
    "bytes that are no text": Case(_bytes(b'{"format":1,"id":"\xff"}'), _NONE, 3),
    "a folder": Case(Path.mkdir, "no pool in", 10),
    "a pipe": Case(os.mkfifo, "no pool in", 10),
    "a link to nowhere": Case(_link("nowhere"), "no pool in", 10),
    "a link to a device": Case(_link("/dev/zero"), "no pool in", 10),
}  # fmt: skip


# -- recipes ------------------------------------------------------------------------------------


def _toml(text: str | bytes, words: str = "recipe") -> Case:
    data = text if isinstance(text, bytes) else text.encode()
    return Case(_bytes(data), words, 2)


_LONG = "has a line of more than"

RECIPES = {
    "no TOML": _toml("[unit", "is not TOML"),
    "NUL bytes": _toml(bytes(100), "is not TOML"),
    "bytes that are no text": _toml(b"# caf\xe9", "is not UTF-8"),
    "a byte order mark": _toml(b"\xef\xbb\xbf[unit]\n", "is not TOML"),
    "a key twice": _toml("[unit]\nlr = 1\nlr = 2", "is not TOML"),
    "a table twice": _toml("[unit]\n[unit]", "is not TOML"),
    "half a character": _toml('[model]\nmodel_type = "\\ud800"', "is not TOML"),
    "a table of the future": _toml("[optimizer]\n", "no table [optimizer]"),
    "a table that moves the cursor": _toml('["\\u001b[2J"]', "no table"),
    "a table of 1,900 letters": _toml(f"[{'x' * 1900}]", "no table [xxx"),
    "a key that is unknown": _toml("[unit]\nbatsh = 1", "[unit] has no key batsh"),
    "a list of tables": _toml("[[unit]]\n", "unit must be a table"),
    "words as a number": _toml('[unit]\nlr = "fast"', "[unit] lr must be"),
    "nan": _toml("[unit]\nlr = nan", "[unit] lr must be"),
    "inf": _toml("[unit]\nclip = inf", "[unit] clip must be"),
    "2**70 steps": _toml(f"[unit]\nsteps = {2**70}", "[unit] steps must be"),
    "a number of 1,900 digits": _toml("[unit]\nsteps = " + "9" * 1900, "[unit] steps must be"),
    "a number of 5,000 digits": _toml("[unit]\nsteps = " + "9" * 5000, _LONG),
    "a date as batch": _toml("[unit]\nbatch = 2020-01-01", "[unit] batch must be"),
    "a model without a type": _toml("[model]\nhidden_size = 4", "needs a model_type"),
    "a date in the model": _toml('[model]\nmodel_type = "llama"\na = 2020-01-01', "[model] a cannot"),
    "a home of nobody": _toml("[tokenizer]\nfolder = '~nobody here'", "~nobody here"),
    "1,900 open brackets": _toml("[unit]\nlr = " + "[" * 1900, "is not TOML"),
    "60,000 open brackets": _toml("[unit]\nlr = " + "[\n" * 30_000, "is not TOML"),
    "a key of 500,000 dots": Case(_repeated(b"[model]\n", b"a." * 1000, 30, b"a = 1\n"), _LONG, 2),
    "32 keys of 980 dots": _toml("[model]\n" + "".join(f"b{n}.{'a.' * 980}a=1\n" for n in range(32)), "needs a model_type"),
    "a file of 4 GB": Case(_sparse(b"#", 4 << 30), "the recipe is larger than", 2),
    "a pipe": Case(os.mkfifo, "the recipe is not a regular file", 2),
    "a link to a device": Case(_link("/dev/zero"), "the recipe is not a regular file", 2),
}  # fmt: skip

CASES = {
    "weights": WEIGHTS, "indexes": INDEXES, "configs": CONFIGS, "tokenizers": TOKENIZERS,
    "segments": SEGMENTS, "formats": FORMATS, "recipes": RECIPES,
}  # fmt: skip


# -- the child ----------------------------------------------------------------------------------


def child() -> None:
    """Run each command line of stdin, and answer with one JSON object a line."""
    from click.testing import CliRunner
    from poolreg.cli.main import main

    for words in sys.stdin:
        with contextlib.suppress(OSError):  # else the peak is that of all so far
            Path("/proc/self/clear_refs").write_text("5")
        result = CliRunner().invoke(main, json.loads(words), prog_name="poolreg")
        # Not ru_maxrss: a child begins with that of its parent.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        memory = int(peak[1]) >> 10 if peak else 0
        answer = {"code": result.exit_code, "said": result.output, "peak": memory}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    child()
