"""Which columns each kind of thing has in a table, and how they are written."""

from __future__ import annotations

from .output import Column, count, duration, fixed, short, size, text

_DIGEST = Column("digest", write=short)
_ADDED = Column("added", "added (UTC)")

OVERVIEW = (Column("kind"), Column("name"), Column("digest"))
PARTITIONS = (
    Column("name"), Column("parent"), Column("documents", write=count),
    Column("bytes", "text", size), Column("units", write=count), Column("trained", write=count),
    Column("duplicates", write=count), _DIGEST,
)  # fmt: skip
EVALSETS = (
    Column("name"), Column("documents", write=count), Column("bytes", "text", size),
    Column("evaluations", write=count), _DIGEST,
)  # fmt: skip
MODELS = (
    Column("name"), Column("role"), Column("parameters", write=count),
    Column("bytes", "size", size), Column("dtype"), Column("model_type", "type"), Column("seed"),
    Column("mixture", "trained on"), Column("budget"), _DIGEST,
)  # fmt: skip
UNITS = (
    Column("unit", write=text), Column("documents", write=count), Column("bytes", "text", size),
    _DIGEST,
)  # fmt: skip
FILES = (
    Column("path"), Column("bytes", "size", size), Column("documents", write=count),
    Column("sha256", write=short),
)  # fmt: skip
MODEL_FILES = (
    Column("name"), Column("role"), Column("bytes", "size", size), Column("object", write=short),
)  # fmt: skip
RUNS = (
    Column("role"), Column("how"), Column("mixture", "trained on"), Column("scheme"),
    Column("budget"), Column("tokens", write=count), Column("steps", write=count),
    Column("seconds", "time", duration), Column("final_loss", "final loss", fixed(3)), _ADDED,
)  # fmt: skip
SHARED = (Column("name", "shares text with"), Column("documents", write=count))
COMPONENTS = (
    Column("model"), Column("weight"), Column("share", write=fixed(4)), _DIGEST,
)  # fmt: skip
LINEAGE = (
    Column("child_label", "what"), Column("relation"), Column("parent_label", "of"),
    Column("weight", write=fixed(4)), Column("child", "digest", short),
    Column("parent", "of digest", short),
)  # fmt: skip
DIFF = (
    Column("tensor"), Column("dtype_a", "dtype A"), Column("dtype_b", "dtype B"),
    Column("shape_a", "shape A"), Column("shape_b", "shape B"),
    Column("difference", "‖A−B‖"), Column("relative", "‖A−B‖/‖A‖"), Column("largest", "max |A−B|"),
)  # fmt: skip
DRIFT = (Column("partition"), Column("path"), Column("reason"))
CHECKS = (Column("name"), Column("files", write=count), Column("drifted", write=count))
TRAINED = (
    Column("label", "model"), Column("role"), Column("tokens", write=count),
    Column("final_loss", "final loss", fixed(3)), Column("seconds", "time", duration),
    Column("new"), _DIGEST,
)  # fmt: skip
CLASHES = (Column("space", "kind"), Column("name"), Column("kept_as", "kept as"))
HISTORY = (
    Column("added", "time (UTC)", whole=True), Column("event", "what", whole=True),
    Column("kind", whole=True), Column("name"), Column("digest", write=short, whole=True),
    Column("detail"),
)  # fmt: skip
STATS = (
    Column("of"), Column("what"), Column("count", write=count), Column("bytes", "size", size),
)  # fmt: skip
BIGGEST = (
    Column("bytes", "size", size), Column("owner", "belongs to"), Column("digest", write=short),
)  # fmt: skip
DOCTOR = (Column("check"), Column("status"), Column("said", "found"))
REMOVED = (
    Column("name"), Column("kind"), Column("removed", "removed (UTC)"),
    Column("bytes", "data here", size), Column("state"), _DIGEST,
)  # fmt: skip
GARBAGE = (
    Column("reason"), Column("files", write=count), Column("bytes", "size", size),
    Column("waiting", "waiting", count), Column("waiting_bytes", "their size", size),
)  # fmt: skip
GARBAGE_FILES = (Column("bytes", "size", size), Column("reason"), Column("path", "biggest"))
FINDINGS = (
    Column("what"), Column("of"), Column("problem"), Column("way_out", "way out"),
)  # fmt: skip
MENDED = (Column("what"), Column("done"), Column("kept", "kept in"))
QUERIES = (Column("name"), Column("description"))
TASK_SCORES = (
    Column("label", "subject"), Column("task"), Column("task_version", "version"),
    Column("n_shot", "shots"), Column("metric"), Column("filter"), Column("value", write=fixed(4)),
    Column("stderr", write=fixed(4)), Column("samples", write=count),
    Column("sample_limit", "limit"),
)  # fmt: skip
SEGMENTS = (Column("segment"), Column("bytes", "size", size))
