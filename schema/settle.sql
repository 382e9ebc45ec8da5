-- Run after each indexing: what depends on the latest of several records.

-- name: current_names
-- The latest naming of each name is its meaning.
UPDATE names SET current = (names.record = latest.record)
FROM (SELECT space, name, arg_max(record, (added, record)) AS record FROM names GROUP BY space, name) AS latest
WHERE names.space = latest.space AND names.name = latest.name AND names.current IS DISTINCT FROM (names.record = latest.record);

-- name: current_places
-- Only the latest place of a partition's files is kept.
DELETE FROM partition_files
WHERE record NOT IN (SELECT arg_max(record, (added, record)) FROM partition_files GROUP BY partition);

-- name: removed_partitions
-- Tombstones and restorations.
UPDATE partitions SET removed = coalesce((SELECT arg_max(removals.removed, (removals.added, record)) FROM removals WHERE kind = 'partition' AND target = partitions.digest), false)
WHERE digest IN (SELECT target FROM removals);

-- name: removed_evalsets
-- Tombstones and restorations.
UPDATE evalsets SET removed = coalesce((SELECT arg_max(removals.removed, (removals.added, record)) FROM removals WHERE kind = 'evalset' AND target = evalsets.digest), false)
WHERE digest IN (SELECT target FROM removals);

-- name: removed_models
-- Tombstones and restorations.
UPDATE models SET removed = coalesce((SELECT arg_max(removals.removed, (removals.added, record)) FROM removals WHERE kind = 'model' AND target = models.digest), false)
WHERE digest IN (SELECT target FROM removals);

-- name: trusted_models
-- Models whose code was allowed to run after they had come from elsewhere.
UPDATE models SET trusted_code = true
WHERE NOT trusted_code AND digest IN (SELECT model FROM trusts);
