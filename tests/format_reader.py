"""A second implementation of reading a pool, written from docs/format.md alone.

It uses Python's standard library and nothing of poolreg, knows no catalog, and trusts nothing:
every line has its checksum, every object is hashed, every id is computed again from what the
document says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from format_rules import (
    Tensor,
    average,
    canonical,
    canonical_file,
    configuration,
    digest,
    is_name,
    need,
    sha256,
    tensors_of,
    tokenizer,
)

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
REQUEST = (
    "variant", "parent", "ratio", "calibration", "method", "target", "without", "epsilon", "step",
    "sequential",
)  # fmt: skip


class Record(NamedTuple):
    kind: str
    id: str
    at: str
    body: dict[str, Any]
    objects: dict[str, int]


def record_of(line: bytes) -> Record:
    """Read a line without its line feed."""
    need(b"%08x" % zlib.crc32(line[9:]) == line[:8] and line[8:9] == b" ", "a line's checksum")
    fields = json.loads(line[9:])
    need(canonical(fields) == line[9:], "a record is not canonical")
    need(fields.pop("v") == 1, "the version of a record")
    need(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", fields["at"]), "a time")
    return Record(**fields)


def pool_id(root: Path) -> str:
    said = json.loads((root / "FORMAT").read_bytes())
    crc = said.pop("crc32", None)
    need(crc in (None, f"{zlib.crc32(canonical(said)):08x}"), "the checksum of FORMAT")
    need(said.keys() == {"format", "id"} and said["format"] == 1, "FORMAT")
    return str(said["id"])


class Absent(Exception):
    """An object that may be absent, and is."""


class PoolReader:
    """A pool in `root` as its journal says; `check` looks at everything that can be proved."""

    def __init__(self, root: Path) -> None:
        self.root, self.id = root, pool_id(root)
        self.records: dict[str, dict[str, Record]] = defaultdict(dict)  # that count, by kind
        self.sizes: dict[str, int] = {}
        for record in self._journal():
            self.sizes |= record.objects
            present = self.records[record.kind].get(record.id)
            if present is None or record.at < present.at:
                self.records[record.kind][record.id] = record

        self.absent = {name for name in self._may_be_absent() if not self.path(name).exists()}

    def _journal(self) -> Iterator[Record]:
        for path in sorted((self.root / "journal").iterdir()):
            if re.fullmatch(r"[A-Za-z0-9._-]{1,120}\.jsonl", path.name):
                *lines, _torn = path.read_bytes().split(b"\n")
                yield from map(record_of, lines)

    def path(self, name: str) -> Path:
        return self.root / "objects" / name[:2] / name[2:]

    def object(self, name: str) -> bytes:
        if name in self.absent:
            raise Absent
        data = self.path(name).read_bytes()
        need(sha256(data) == name and len(data) == self.sizes[name], f"object {name}")
        return data

    def _latest(self, kind: str, *about: str) -> dict[tuple[str, ...], Record]:
        said = sorted(self.records[kind].values(), key=lambda record: (record.at, record.id))
        return {tuple(record.body[key] for key in about): record for record in said}

    def removed(self) -> set[tuple[str, ...]]:
        """Return what is removed, as (kind, digest)."""
        said = self._latest("removal", "kind", "target")
        return {thing for thing, record in said.items() if record.body["removed"]}

    def names(self, space: str) -> dict[str, str]:
        """Return what each name of a space means."""
        gone = self.removed()
        said = {name: r.body["target"] for (_, name), r in self._latest("name", "space", "name").items()
                if r.body["space"] == space}  # fmt: skip
        return {name: target for name, target in said.items() if (space, target) not in gone}

    def _may_be_absent(self) -> set[str]:
        """Return the objects that a collection may have taken, and those that a pull left."""
        gone = self.removed()
        kept: set[str] = set()
        dead: set[str] = set()
        for record in (record for found in self.records.values() for record in found.values()):
            needs = [(record.kind, record.id)]
            if record.kind == "calibration":
                body = record.body
                needs = [("model", body["subject"]), (body["text_kind"], body["text"])]
            (dead if gone.intersection(needs) else kept).update(record.objects)
        left = {name for r in self.records["transfer"].values() for name in r.body["left"]}
        return (dead - kept) | left

    def check(self) -> Counter[str]:
        """Check all objects and records; return how many of each kind were computed again."""
        for name in self.sizes.keys() - self.absent:
            self.object(name)
        done: Counter[str] = Counter()
        for kind, found in list(self.records.items()):
            for record in found.values():
                with contextlib.suppress(Absent):
                    need(getattr(self, f"_{kind}")(record) == record.id, f"{kind} {record.id}")
                    done[kind] += 1
        for space in ("partition", "model", "evalset"):
            for target in self.names(space).values():
                need(target in self.records[space], f"the name of {target}")
        return done

    # -- what each id follows from

    def _statement(self, r: Record) -> str:
        return digest({"kind": r.kind, "body": r.body, "at": r.at})

    def _name(self, r: Record) -> str:
        need(is_name(r.body["name"]), f"the name {r.body['name']!r}")
        return self._statement(r)

    _removal = _location = _transfer = _trust = _statement

    def _fact(self, r: Record) -> str:
        return digest({"kind": r.kind, "body": r.body})

    _task_score = _fact

    def _run(self, r: Record) -> str:
        return r.id if r.id == self._statement(r) else self._fact(r)

    def _body(self, r: Record) -> str:
        return digest(r.body)

    _contamination = _protocol = _body

    def _partition(self, r: Record) -> str:
        content, units = r.body["content"], r.body["units"]
        need(len(self.object(content)) == 32 * r.body["documents"], "documents of a partition")
        need(sum(unit["bytes"] for unit in units) == r.body["bytes"], "bytes of a partition")
        for number, unit in enumerate(units, 1):
            of = {"unit": 1, "partition": r.id, "number": number}
            need(unit["digest"] == digest(of), f"unit {number} of {r.id}")
        said = {"partition": 1, "content": content, "units": len(units), "slicing": 1}
        return digest(said)

    def documents(self, evalset: str) -> list[bytes]:
        """Return the documents of an evalset as UTF-8."""
        *lines, end = self.object(self.records["evalset"][evalset].body["object"]).split(b"\n")
        texts = [json.loads(line) for line in lines]
        need(not end and lines == [canonical(text) for text in texts], "an evalset's text")
        return [text.encode() for text in texts]

    def _evalset(self, r: Record) -> str:
        texts = self.documents(r.id)
        need((len(texts), sum(map(len, texts))) == (r.body["documents"], r.body["bytes"]), "counts")
        digests = b"".join(hashlib.sha256(text).digest() for text in texts)
        need(self.object(r.body["content"]) == digests, "documents of an evalset")
        return digest({"evalset": 1, "content": r.body["content"]})

    def weights(self, model: str) -> dict[str, Tensor]:
        files = self.records["model"][model].body["files"]
        found: dict[str, Tensor] = {}
        for file in files:
            if file["role"] == "weights":
                found |= tensors_of(self.object(file["object"]))
        return found

    def _model(self, r: Record) -> str:
        body, found = r.body, self.weights(r.id)
        tensors = [
            [n, found[n].dtype, found[n].shape, sha256(found[n].data)] for n in sorted(found)
        ]
        files = {f["name"]: self.object(f["object"]) for f in body["files"]}
        config = json.loads(files["config.json"])
        of_text = {f["name"] for f in body["files"] if f["role"] == "tokenizer"}
        tokens = tokenizer({name: files[name] for name in of_text})
        by_dtype: dict[str, int] = defaultdict(int)
        for tensor in found.values():
            by_dtype[tensor.dtype] += len(tensor.data)
        floating = [t for t in found.values() if t.dtype.startswith(("F", "BF"))]
        facts = {
            "tensors": tensors, "tokenizer": tokens, "model_type": config["model_type"],
            "parameters": sum(math.prod(t.shape) for t in floating),
            "bytes": sum(by_dtype.values()),
            "dtype": max(sorted(by_dtype), key=lambda dtype: by_dtype[dtype]),
            "context_length": _first_positive(config, LENGTHS),
            "vocab_size": _first_positive(config, ("vocab_size",)),
        }  # fmt: skip
        need(facts == {key: body[key] for key in facts}, f"facts of model {r.id}")
        of = {"model": 1, "tensors": tensors, "config": configuration(config), "tokenizer": tokens}
        return digest(of)

    def _recipe(self, r: Record) -> str:
        rows = r.body["components"]
        _check_weights(rows)
        return digest({"recipe": "average-1", "components": rows})

    def _mixture(self, r: Record) -> str:
        body = r.body
        _check_weights(body["weights"])
        need(self.blend(body["weights"], body["scheme"]) == body["blend"], f"blend of {r.id}")
        need(body["subject"] in self.records["recipe"] | self.records["model"], "subject")
        keys = ("weights", "scheme", "subject")
        return digest({"mixture": 1, **{key: body[key] for key in keys}})

    def blend(self, weights: list[list[Any]], scheme: str) -> str:
        totals: dict[str, Fraction] = defaultdict(Fraction)
        for partition, number, *fraction in weights:
            units = self.records["partition"][partition].body["units"]
            chosen = [units[number - 1]] if number else units
            for unit in chosen:
                share = Fraction(*fraction)
                totals[unit["digest"]] += share if scheme == "micro" else share / len(chosen)
        all_of_it = sum(totals.values())
        shares = sorted((unit, share / all_of_it) for unit, share in totals.items())
        return digest(["blend", 1, [[u, s.numerator, s.denominator] for u, s in shares]])

    def _evaluation(self, r: Record) -> str:
        body = r.body
        rows = {
            name: t.values for name, t in tensors_of(self.object(body["document_scores"])).items()
        }
        sums = math.fsum(rows["nll"]), sum(rows["tokens"]), sum(rows["bytes"]), len(rows["nll"])
        said = tuple(body[key] for key in ("nll", "tokens", "bytes", "documents"))
        need(sums == said, f"sums of evaluation {r.id}")
        if self.records["evalset"][body["evalset"]].body["object"] not in self.absent:
            lengths = tuple(len(text) for text in self.documents(body["evalset"]))
            need(rows["bytes"] == lengths, f"bytes of evaluation {r.id}")
        if body["token_scores"]:
            scores = iter(tensors_of(self.object(body["token_scores"]))["nll"].values)
            for count, total in zip(rows["tokens"], rows["nll"], strict=True):
                nll = 0.0
                for _ in range(count):
                    nll += next(scores)
                need(nll == total, f"token scores of evaluation {r.id}")
            need(next(scores, None) is None, f"number of token scores of {r.id}")
        need(body["protocol"] in self.records["protocol"], "protocol")
        return digest([body[key] for key in ("subject", "evalset", "protocol")])

    def _lap(self, r: Record) -> str:
        body = r.body
        tensors = tensors_of(self.object(body["document_scores"]))
        sums = math.fsum(tensors["nll"].values), sum(tensors["tokens"].values)
        need(sums == (body["nll"], body["tokens"]), f"sums of lap {r.id}")
        texts = self.documents(body["evalset"])

        def key(number: int) -> str:
            return sha256(f"race 1 {body['evalset']} {number}".encode())

        order = sorted(range(len(texts)), key=key)
        start, stop = (
            min(len(texts), max(16, math.ceil(len(texts) / 2 ** (4 - lap)))) if lap >= 0 else 0
            for lap in (body["lap"] - 1, body["lap"])
        )
        lengths = tuple(len(texts[number]) for number in order[start:stop])
        need(tensors["bytes"].values == lengths, f"documents of lap {r.id}")
        keys = ("subject", "evalset", "protocol")
        return digest({"lap": 1, "number": body["lap"], **{key: body[key] for key in keys}})

    def _calibration(self, r: Record) -> str:
        of = {key: r.body[key] for key in ("subject", "text", "protocol")}
        of["tokens"] = r.body["token_limit"]
        older = digest({"calibration": 1, **of})
        return older if r.id == older else digest({"calibration": 2, **of})

    def _variant(self, r: Record) -> str:
        return digest({key: r.body[key] for key in REQUEST})

    def _build(self, r: Record) -> str:
        """Also make the merge again, if it is one file of F32."""
        body = r.body
        rows = self.records["recipe"][body["subject"]].body["components"]
        whole = math.lcm(*(denominator for *_, denominator in rows))
        weights = [numerator * (whole // denominator) for _, numerator, denominator in rows]
        made = average([self.weights(model) for model, *_ in rows], weights)
        files = self.records["model"][body["model"]].body["files"]
        stored = [file["object"] for file in files if file["role"] == "weights"]
        need(stored == [sha256(canonical_file(made, {"format": "pt"}))], "a merge made again")
        keys = ("model", "subject", "dtype", "max_shard_bytes")
        return digest({"build": 1, **{key: body[key] for key in keys}})


def _first_positive(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    inner = config.get("text_config") or {}
    said = (config[key] if key in config else inner.get(key) for key in keys)
    return next((value for value in said if type(value) is int and value > 0), None)


def _check_weights(rows: list[list[Any]]) -> None:
    need(rows == sorted(rows), "weights are sorted")
    shares = [Fraction(*row[-2:]) for row in rows]
    need(sum(shares) == 1 and min(shares) > 0, "weights sum to 1")
    for row, share in zip(rows, shares, strict=True):
        need(row[-2:] == [share.numerator, share.denominator], "lowest terms")
