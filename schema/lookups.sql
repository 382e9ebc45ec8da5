-- Named statements that the library uses. Python passes parameters, never pieces of SQL.

-- name: names
-- Current names of a space whose target is not removed.
SELECT name, target, parent FROM names
WHERE space = $space AND current AND target NOT IN (
    SELECT digest FROM partitions WHERE removed UNION ALL
    SELECT digest FROM models WHERE removed UNION ALL
    SELECT digest FROM evalsets WHERE removed)
ORDER BY name;

-- name: partition_digests
-- Partitions by the beginning of their digest.
SELECT digest FROM partitions WHERE starts_with(digest, $prefix) AND NOT removed;

-- name: model_digests
-- Models by the beginning of their digest.
SELECT digest FROM models WHERE starts_with(digest, $prefix) AND NOT removed;

-- name: evalset_digests
-- Evalsets by the beginning of their digest.
SELECT digest FROM evalsets WHERE starts_with(digest, $prefix) AND NOT removed;

-- name: partition
-- One partition.
SELECT * FROM partitions WHERE digest = $digest;

-- name: partition_list
-- All partitions that have a name, with how many of their units have a model.
SELECT name, parent, documents, bytes, units,
       (SELECT count(DISTINCT model_units.unit) FROM model_units JOIN units ON units.digest = model_units.unit
        JOIN runs ON runs.digest = model_units.run AND runs.role = 'unit'
        JOIN models ON models.digest = runs.model AND NOT models.removed
        WHERE units.partition = partitions.digest) AS trained,
       duplicates, partitions.added, partitions.digest
FROM names JOIN partitions ON partitions.digest = names.target
WHERE names.space = 'partition' AND current AND NOT removed
ORDER BY name;

-- name: partition_files
-- Where a partition's text lies.
SELECT path, bytes, sha256, documents, field FROM partition_files
WHERE partition = $partition ORDER BY position;

-- name: partition_units
-- The base units of a partition.
SELECT digest, unit, documents, bytes FROM units WHERE partition = $partition ORDER BY unit;

-- name: units
-- The base units of several partitions.
SELECT digest, partition, unit, documents, bytes FROM units
WHERE partition IN (SELECT unnest($partitions)) ORDER BY partition, unit;

-- name: partition_contents
-- Document digests of every partition, of removed ones too: they may come back.
SELECT digest, content FROM partitions;

-- name: evalset_contents
-- Document digests of every evalset, of removed ones too: they may come back.
SELECT digest, content FROM evalsets;

-- name: evalset
-- One evalset.
SELECT * FROM evalsets WHERE digest = $digest;

-- name: evalset_list
-- All evalsets that have a name.
SELECT name, documents, bytes,
       (SELECT count(*) FROM evaluations WHERE evalset = evalsets.digest) AS evaluations,
       evalsets.added, evalsets.digest
FROM names JOIN evalsets ON evalsets.digest = names.target
WHERE names.space = 'evalset' AND current AND NOT removed
ORDER BY name;

-- name: contamination
-- Which partitions share documents with which evalsets.
SELECT evalset, partition, documents FROM contamination;

-- name: model
-- One model.
SELECT * FROM models WHERE digest = $digest;

-- name: model_list
-- All models with their role.
SELECT label AS name, role, parameters, models.bytes, dtype, model_type,
       left(models.seed_label, 40) AS seed, mixture, budget, added, digest
FROM (
    SELECT models.*, model_labels.*, seeds.label AS seed_label
    FROM models
    JOIN model_labels ON model_labels.model = models.digest
    LEFT JOIN model_labels AS seeds ON seeds.model = model_labels.seed
) AS models
WHERE NOT removed
ORDER BY CASE role WHEN 'seed' THEN 0 WHEN 'unit' THEN 1 WHEN 'reference' THEN 2 ELSE 3 END, name;

-- name: model_files
-- The files of a model.
SELECT role, name, object, bytes FROM model_files WHERE model = $model ORDER BY role, name;

-- name: model_tensors
-- The tensors of a model.
SELECT name, dtype, shape, sha256 FROM model_tensors WHERE model = $model ORDER BY name;

-- name: model_runs
-- How a model came to be.
SELECT * FROM runs WHERE model = $model ORDER BY added DESC, digest;

-- name: model_label
-- Name and role of a model.
SELECT label, role, seed FROM model_labels WHERE model = $model;

-- name: trained_on
-- The partitions that a model was trained on.
SELECT DISTINCT partition FROM model_units JOIN units ON units.digest = model_units.unit
WHERE model = $model ORDER BY partition;

-- name: lineage
-- What a model was made from and what was made from it.
SELECT child, child_label, parent, parent_label, relation, weight FROM lineage
WHERE child = $digest OR parent = $digest ORDER BY child_label, parent_label;

-- name: seeds
-- Seed models: those trained or added as seeds.
SELECT model AS digest, label FROM model_labels WHERE role = 'seed' AND NOT removed ORDER BY label;

-- name: unit_models
-- The latest model of each base unit that was trained from a seed.
SELECT units.partition, units.unit, model_units.model, runs.tokens
FROM runs
JOIN model_units ON model_units.run = runs.digest
JOIN units ON units.digest = model_units.unit
JOIN models ON models.digest = runs.model AND NOT models.removed
WHERE runs.role = 'unit' AND runs.seed = $seed
QUALIFY row_number() OVER (PARTITION BY model_units.unit ORDER BY runs.added DESC, runs.digest) = 1;

-- name: references_of
-- Reference models that were really trained on a blend from a seed.
SELECT runs.model, runs.budget FROM runs
JOIN models ON models.digest = runs.model AND NOT models.removed
WHERE runs.role = 'reference' AND runs.blend = $blend AND runs.seed = $seed
QUALIFY row_number() OVER (PARTITION BY runs.budget ORDER BY runs.added DESC, runs.digest) = 1
ORDER BY runs.budget;

-- name: evaluations
-- Memoised evaluations by their keys.
SELECT digest, subject, evalset, protocol, nll, tokens, bytes, documents, document_scores
FROM evaluations WHERE digest IN (SELECT unnest($digests));

-- name: laps
-- What was scored of parts of evalsets, by the keys of the laps.
SELECT digest, seconds, device, document_scores FROM laps WHERE digest IN (SELECT unnest($digests));

-- name: mixtures_known
-- Which mixtures are recorded already.
SELECT digest FROM mixtures WHERE digest IN (SELECT unnest($digests));

-- name: protocols_known
-- Which protocols are recorded already.
SELECT digest FROM protocols WHERE digest IN (SELECT unnest($digests));

-- name: run_known
-- Runs whose recipe says that they answer a training job.
SELECT runs.model, runs.tokens, runs.seconds, runs.final_loss FROM runs JOIN models ON models.digest = runs.model AND NOT models.removed
WHERE recipe ->> 'job' = $job ORDER BY runs.added LIMIT 1;

-- name: speed
-- Bytes scored a second lately, to estimate what a plan will take.
SELECT sum(bytes) / nullif(sum(seconds), 0) AS bytes_per_second
FROM (SELECT bytes, seconds FROM evaluations WHERE seconds > 0 ORDER BY added DESC LIMIT 50);

-- name: objects
-- Every object that a record names.
SELECT digest, bytes, kind FROM objects;

-- name: sweep_scores
-- Scores of some mixtures under some protocols, best first within an evalset.
SELECT evalset, label AS mixture, scheme, size, perplexity, bits_per_byte, loss, tokens
FROM scores
WHERE (label, scheme, subject) IN (
      SELECT (mixture, scheme, subject) FROM mixtures WHERE digest IN (SELECT unnest($mixtures)))
  AND evalset_digest IN (SELECT unnest($evalsets)) AND protocol IN (SELECT unnest($protocols))
ORDER BY evalset, bits_per_byte, label, scheme;

-- name: protocol
-- One protocol.
SELECT * FROM protocols WHERE digest = $digest;

-- name: calibration
-- One calibration.
SELECT * FROM calibrations WHERE digest = $digest;

-- name: variant_of_request
-- The variant that a request gave, if its model is still there.
SELECT variants.model, variants.logit_difference, variants.shared_bytes, variants.seconds, models.bytes
FROM variants JOIN models ON models.digest = variants.model AND NOT models.removed
WHERE variants.digest = $request;

-- name: variant_list
-- All variants whose model is there.
SELECT * FROM variant_list;

-- name: variant_modules
-- What the parts of a variant came to.
SELECT layer, part, size, kept, parameters, kept_parameters, predicted_error, error
FROM variant_modules WHERE variant = $variant ORDER BY layer, part;

-- name: token_scores
-- Where the losses of each token lie, for single models on one evalset.
SELECT subject, token_scores FROM evaluations
WHERE evalset = $evalset AND protocol = $protocol AND subject IN (SELECT unnest($models)) AND token_scores IS NOT NULL;

-- name: reference_list
-- Models really trained on mixtures from a seed, the latest of each mixture and budget; adaptive: the mixture was proposed after looking at scores.
SELECT runs.model, runs.mixture, runs.scheme, runs.budget, runs.blend,
       EXISTS (SELECT 1 FROM mixtures WHERE mixtures.blend = runs.blend AND mixtures.seed = runs.seed AND origin = 'adaptive') AS adaptive
FROM runs
JOIN models ON models.digest = runs.model AND NOT models.removed
WHERE runs.role = 'reference' AND runs.seed = $seed AND runs.blend IS NOT NULL AND runs.mixture IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY runs.blend, runs.budget ORDER BY runs.added DESC, runs.digest) = 1
ORDER BY runs.budget, runs.mixture, runs.blend;

-- name: mixtures_of_seed
-- Mixtures of whole partitions that were asked for from a seed, smallest first.
SELECT DISTINCT mixture, size, origin FROM mixtures WHERE seed = $seed ORDER BY size, mixture;

-- name: task_measures
-- What the tasks measure, with how many models or mixtures have a value.
SELECT measure, metric, measure_digest, bool_or(higher_is_better) AS higher_is_better, count(DISTINCT subject) AS subjects
FROM measures WHERE source = 'task' GROUP BY measure, metric, measure_digest ORDER BY measure, metric, measure_digest;

-- name: task_values
-- Latest values of some subjects on some tasks, turned so that less is better.
SELECT subject, measure AS measure_digest, if(higher_is_better, -value, value) AS value, stderr FROM task_results
WHERE subject IN (SELECT unnest($subjects)) AND measure IN (SELECT unnest($measures));

-- name: task_list
-- Latest scores on tasks (one, or all) with what they belong to.
SELECT label, scheme, task, metric, filter, value, stderr, higher_is_better, n_shot, samples, sample_limit,
       task_version, task_hash, harness, harness_version, measured, subject, measure
FROM task_results JOIN subjects USING (subject)
WHERE $task::VARCHAR IS NULL OR task = $task
ORDER BY task, n_shot, metric, filter, sample_limit NULLS FIRST, task_version, task_hash, label, scheme, subject;

-- name: task_scores_known
-- Which scores are recorded already.
SELECT digest FROM task_scores WHERE digest IN (SELECT unnest($digests));

-- name: task_scores_requested
-- What requests to a harness gave, the latest of each.
SELECT subject, request, task, metric, filter, value, stderr, higher_is_better, n_shot, samples, sample_limit,
       task_version, task_hash, harness, harness_version, measured, measure
FROM task_scores WHERE request IN (SELECT unnest($requests)) AND subject IN (SELECT unnest($subjects))
QUALIFY row_number() OVER (PARTITION BY subject, request, measure ORDER BY measured DESC NULLS LAST, added DESC, digest) = 1
ORDER BY task, metric, filter;

-- name: averages_of
-- The averages of a seed's models that were asked for, with their components.
SELECT asked.subject, coalesce(model, asked.subject) AS model, coalesce(numerator, 1) AS numerator, coalesce(denominator, 1) AS denominator
FROM (SELECT DISTINCT subject FROM mixtures WHERE seed = $seed) AS asked
LEFT JOIN recipe_components ON recipe = asked.subject
ORDER BY asked.subject, model;

-- name: builds_of
-- How a kept merge was built.
SELECT subject, dtype, max_shard_bytes FROM builds WHERE model = $model ORDER BY digest;

-- name: recipe_components
-- The models of an average with their exact weights.
SELECT model, numerator, denominator FROM recipe_components WHERE recipe = $recipe ORDER BY model;

-- name: last_transfer
-- Where the pool was last pushed to, or pulled from; bundles cannot be written to again.
SELECT direction, place, repo_type, revision, version FROM transfers
WHERE direction IN (SELECT unnest($directions)) AND (repo_type <> '' OR contains(place, '://'))
ORDER BY added DESC, record LIMIT 1;

-- name: weight_files
-- The weights files of all models.
SELECT model, object FROM model_files WHERE role = 'weights' ORDER BY model, object;

-- name: builds
-- All kept merges.
SELECT DISTINCT model FROM builds ORDER BY model;

-- name: object_list
-- Every object that a record names, whether it is a weights file, and whether a pull left it.
SELECT digest, bytes, digest IN (SELECT object FROM model_files WHERE role = 'weights') AS is_weights,
       digest IN (SELECT object FROM transfer_left) AS was_left
FROM objects
ORDER BY digest;

-- name: dangling_names
-- Names of what no record describes.
SELECT space, name FROM names
WHERE current AND target NOT IN (
    SELECT digest FROM partitions UNION ALL SELECT digest FROM models UNION ALL SELECT digest FROM evalsets)
ORDER BY space, name;

-- name: history
-- What happened, newest first; to some digests only, if they are given.
SELECT added, event, kind, name, digest, from_digest, detail FROM history
WHERE ($digests::VARCHAR[] IS NULL OR digest IN (SELECT unnest($digests::VARCHAR[]))
       OR (event = 'moved' AND from_digest IN (SELECT unnest($digests::VARCHAR[]))))
  AND ($since::TIMESTAMP IS NULL OR added >= $since)
ORDER BY added DESC, event, kind, name, record
LIMIT $limit;

-- name: history_names
-- What things were ever called; unnamed models have a label.
SELECT DISTINCT name, digest FROM history WHERE digest IS NOT NULL AND name IS NOT NULL ORDER BY name, digest;

-- name: record_counts
-- Records by kind: distinct facts, of places only those that count.
SELECT 'name' AS kind, count(*) AS records FROM names UNION ALL
SELECT 'removal', count(*) FROM removals UNION ALL
SELECT 'partition', count(*) FROM partitions UNION ALL
SELECT 'location', count(DISTINCT record) FROM partition_files UNION ALL
SELECT 'evalset', count(*) FROM evalsets UNION ALL
SELECT 'contamination', count(*) FROM contamination UNION ALL
SELECT 'model', count(*) FROM models UNION ALL
SELECT 'run', count(*) FROM runs UNION ALL
SELECT 'recipe', count(*) FROM recipes UNION ALL
SELECT 'mixture', count(*) FROM mixtures UNION ALL
SELECT 'protocol', count(*) FROM protocols UNION ALL
SELECT 'evaluation', count(*) FROM evaluations UNION ALL
SELECT 'lap', count(*) FROM laps UNION ALL
SELECT 'calibration', count(*) FROM calibrations UNION ALL
SELECT 'variant', count(*) FROM variants UNION ALL
SELECT 'task_score', count(*) FROM task_scores UNION ALL
SELECT 'build', count(*) FROM builds UNION ALL
SELECT 'transfer', count(*) FROM transfers UNION ALL
SELECT 'trust', count(*) FROM trusts
ORDER BY kind;

-- name: object_use
-- What objects hold, how many of them are here ($digests with $sizes, and those of no record), and how many a pull left elsewhere.
WITH held AS (
    SELECT digest, arg_min(content, position) AS content
    FROM (
        SELECT object AS digest, if(role = 'weights', 'weights', 'configs and tokenizers') AS content, if(role = 'weights', 1, 2) AS position FROM model_files UNION ALL
        SELECT object, 'evalset texts', 3 FROM evalsets UNION ALL
        SELECT content, 'document digests', 4 FROM evalsets UNION ALL
        SELECT content, 'document digests', 4 FROM partitions UNION ALL
        SELECT windows, 'calibrations', 5 FROM calibrations UNION ALL
        SELECT unnest(layers), 'calibrations', 5 FROM calibrations UNION ALL
        SELECT document_scores, 'document scores', 6 FROM evaluations WHERE document_scores IS NOT NULL UNION ALL
        SELECT document_scores, 'document scores', 6 FROM laps UNION ALL
        SELECT token_scores, 'token scores', 7 FROM evaluations WHERE token_scores IS NOT NULL)
    GROUP BY digest
), here AS (
    SELECT unnest($digests::VARCHAR[]) AS digest, unnest($sizes::BIGINT[]) AS bytes
)
SELECT CASE WHEN objects.digest IS NULL THEN 'of no record' ELSE coalesce(content, 'other') END AS content,
       count(here.digest) AS objects, coalesce(sum(here.bytes), 0)::BIGINT AS bytes,
       count(*) - count(here.digest) AS missing,
       coalesce(sum(objects.bytes) FILTER (WHERE here.digest IS NULL), 0)::BIGINT AS missing_bytes,
       count(*) FILTER (WHERE here.digest IS NULL AND objects.digest IN (SELECT object FROM transfer_left)) AS left_elsewhere
FROM objects
FULL JOIN here USING (digest)
LEFT JOIN held USING (digest)
GROUP BY ALL ORDER BY bytes DESC, content;

-- name: shared_bytes
-- Bytes of the files of all models, and of the objects that hold them.
SELECT coalesce(sum(bytes), 0)::BIGINT AS bytes,
       coalesce((SELECT sum(bytes) FROM (SELECT DISTINCT object, bytes FROM model_files)), 0)::BIGINT AS distinct_bytes
FROM model_files;

-- name: unstored_merges
-- Averages of several models that were asked for and are not kept as models, and the bytes of the weights that they would have.
SELECT count(*) AS merges, coalesce(sum(bytes), 0)::BIGINT AS bytes
FROM (
    SELECT recipe_components.recipe, max(models.bytes) AS bytes
    FROM recipe_components
    JOIN models ON models.digest = recipe_components.model
    WHERE recipe IN (SELECT subject FROM mixtures)
      AND recipe NOT IN (SELECT subject FROM builds JOIN models ON models.digest = builds.model AND NOT removed)
    GROUP BY recipe HAVING count(*) > 1);

-- name: object_owners
-- What some objects ($digests) belong to.
SELECT object AS digest, label || ' ' || model_files.name AS owner FROM model_files JOIN model_labels USING (model)
WHERE object IN (SELECT unnest($digests))
UNION ALL
SELECT object, coalesce(name, left(digest, 12)) || ' (evalset)' FROM evalsets LEFT JOIN evalset_names ON evalset = digest
WHERE object IN (SELECT unnest($digests))
UNION ALL
SELECT content, coalesce(name, left(digest, 12)) || ' (evalset)' FROM evalsets LEFT JOIN evalset_names ON evalset = digest
WHERE content IN (SELECT unnest($digests))
UNION ALL
SELECT content, coalesce(name, left(digest, 12)) || ' (partition)'
FROM partitions LEFT JOIN names ON space = 'partition' AND target = digest AND current
WHERE content IN (SELECT unnest($digests))
UNION ALL
SELECT document_scores, coalesce(label, left(evaluations.subject, 12)) || ' on ' || coalesce(evalset_names.name, left(evaluations.evalset, 12))
FROM evaluations LEFT JOIN subjects USING (subject) LEFT JOIN evalset_names USING (evalset)
WHERE document_scores IN (SELECT unnest($digests))
UNION ALL
SELECT document_scores, coalesce(label, left(laps.subject, 12)) || ' on ' || coalesce(evalset_names.name, left(laps.evalset, 12)) || ' (lap ' || lap + 1 || ')'
FROM laps LEFT JOIN subjects USING (subject) LEFT JOIN evalset_names USING (evalset)
WHERE document_scores IN (SELECT unnest($digests))
UNION ALL
SELECT token_scores, coalesce(label, left(evaluations.subject, 12)) || ' on ' || coalesce(evalset_names.name, left(evaluations.evalset, 12))
FROM evaluations LEFT JOIN subjects USING (subject) LEFT JOIN evalset_names USING (evalset)
WHERE token_scores IN (SELECT unnest($digests))
UNION ALL
SELECT object, coalesce(label, left(calibration.subject, 12)) || ' (calibration)'
FROM (SELECT unnest(list_append(layers, windows)) AS object, subject FROM calibrations) AS calibration LEFT JOIN subjects USING (subject)
WHERE object IN (SELECT unnest($digests))
ORDER BY ALL;

-- name: catalog_version
-- The version of the schema.
SELECT schema_version FROM catalog_info;

-- name: checkup
-- What a check-up needs to know of the catalog as it is: largest model, newest record, how far it has read.
SELECT (SELECT coalesce(max(bytes), 0) FROM models) AS largest_model,
       (SELECT max(added) FROM (
            SELECT max(added) AS added FROM names UNION ALL SELECT max(added) FROM removals UNION ALL
            SELECT max(added) FROM partitions UNION ALL SELECT max(added) FROM partition_files UNION ALL
            SELECT max(added) FROM evalsets UNION ALL SELECT max(added) FROM contamination UNION ALL
            SELECT max(added) FROM models UNION ALL SELECT max(added) FROM runs UNION ALL
            SELECT max(added) FROM recipes UNION ALL SELECT max(added) FROM mixtures UNION ALL
            SELECT max(added) FROM protocols UNION ALL SELECT max(added) FROM evaluations UNION ALL
            SELECT max(added) FROM laps UNION ALL
            SELECT max(added) FROM calibrations UNION ALL SELECT max(added) FROM variants UNION ALL
            SELECT max(added) FROM task_scores UNION ALL SELECT max(added) FROM builds UNION ALL
            SELECT max(added) FROM transfers UNION ALL SELECT max(added) FROM trusts)) AS newest,
       (SELECT map_from_entries(list((segment, indexed_bytes))) FROM journal_segments) AS indexed;

-- name: segments_read
-- How much of each journal segment is in the catalog.
SELECT segment, indexed_bytes FROM journal_segments ORDER BY segment;

-- name: last_removal
-- When something was last removed or restored.
SELECT strftime(max(added), '%Y-%m-%dT%H:%M:%S.%fZ') AS at FROM removals WHERE target = $digest;

-- name: names_of
-- The names that mean something now, whether it is removed or not.
SELECT name FROM names WHERE space = $space AND target = $target AND current ORDER BY name;

-- name: last_naming
-- When a name was last given.
SELECT strftime(max(added), '%Y-%m-%dT%H:%M:%S.%fZ') AS at FROM names WHERE space = $space AND name = $label;

-- name: last_location
-- When it was last said where a partition's text lies.
SELECT strftime(max(added), '%Y-%m-%dT%H:%M:%S.%fZ') AS at FROM partition_files WHERE partition = $partition;

-- name: removed
-- What is removed: the names that are free for it to have again, those that it ever had, what it is called without one, and when it was removed last.
WITH gone AS (
    SELECT 'partition' AS kind, digest, NULL AS label FROM partitions WHERE removed UNION ALL
    SELECT 'evalset', digest, NULL FROM evalsets WHERE removed UNION ALL
    SELECT 'model', model, label FROM model_labels WHERE removed
), named AS (
    SELECT space, target, list(DISTINCT name ORDER BY name) FILTER (current) AS names,
           list(DISTINCT name ORDER BY name) AS ever
    FROM names GROUP BY space, target
), last AS (
    SELECT kind, target, max(added) AS removed FROM removals WHERE removed GROUP BY kind, target
)
SELECT gone.kind, gone.digest, gone.label, coalesce(named.names, []) AS names, coalesce(ever, []) AS ever, last.removed
FROM gone
LEFT JOIN named ON named.space = gone.kind AND named.target = gone.digest
LEFT JOIN last ON last.kind = gone.kind AND last.target = gone.digest
ORDER BY last.removed DESC, gone.kind, gone.digest;

-- name: objects_of
-- The objects that partitions, evalsets and models ($digests) are made of, and whether a pull left them.
SELECT of, object, bytes, object IN (SELECT object FROM transfer_left) AS was_left
FROM (
    SELECT model AS of, object, bytes FROM model_files WHERE model IN (SELECT unnest($digests)) UNION
    SELECT evalsets.digest, object, objects.bytes FROM evalsets JOIN objects ON objects.digest = object
    WHERE evalsets.digest IN (SELECT unnest($digests)) UNION
    SELECT evalsets.digest, content, objects.bytes FROM evalsets JOIN objects ON objects.digest = content
    WHERE evalsets.digest IN (SELECT unnest($digests)) UNION
    SELECT partitions.digest, content, objects.bytes FROM partitions JOIN objects ON objects.digest = content
    WHERE partitions.digest IN (SELECT unnest($digests)))
ORDER BY of, object;

-- name: dependents
-- What rests on a partition, evalset or model ($digest): how many of what, and the first few.
WITH labels AS (SELECT model, label FROM model_labels WHERE NOT removed),
averages AS (
    SELECT recipe AS subject FROM recipe_components WHERE model = $digest UNION SELECT $digest
), found AS (
    SELECT DISTINCT 'model' AS noun, 'trained on it' AS relation, label
    FROM model_units JOIN units ON units.digest = model_units.unit JOIN labels ON labels.model = model_units.model
    WHERE units.partition = $digest
    UNION ALL
    SELECT DISTINCT 'mixture', 'with it', mixtures.mixture
    FROM mixture_weights JOIN mixtures ON mixtures.digest = mixture_weights.mixture WHERE partition = $digest
    UNION ALL
    SELECT DISTINCT 'mixture', 'with it', mixture FROM mixtures WHERE subject IN (FROM averages)
    UNION ALL
    SELECT DISTINCT 'model', 'trained from it', label FROM runs JOIN labels ON labels.model = runs.model WHERE seed = $digest
    UNION ALL
    SELECT DISTINCT 'kept merge', 'with it', label FROM builds JOIN labels ON labels.model = builds.model
    WHERE subject IN (FROM averages)
    UNION ALL
    SELECT DISTINCT 'variant', 'made from it', label FROM variants JOIN labels ON labels.model = variants.model
    WHERE parent IN (FROM averages)
    UNION ALL
    SELECT 'evaluation', 'of it', coalesce(name, left(evaluations.evalset, 12))
    FROM evaluations LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset WHERE subject = $digest
    UNION ALL
    SELECT 'task score', 'of it', task FROM task_scores WHERE subject = $digest
    UNION ALL
    SELECT 'evaluation', 'on it', coalesce(label, left(evaluations.subject, 12))
    FROM evaluations LEFT JOIN (SELECT subject, min(label) AS label FROM subjects GROUP BY subject) AS subjects USING (subject)
    WHERE evalset = $digest
    UNION ALL
    SELECT 'calibration', 'that needs it', left(digest, 12) FROM calibrations WHERE subject = $digest OR text = $digest
)
SELECT noun, relation, count(*) AS count, list(DISTINCT label ORDER BY label)[:4] AS first
FROM found GROUP BY noun, relation ORDER BY noun, relation;

-- name: runs_alike
-- Runs that did the same for the same mixture, the latest first.
SELECT digest, model, strftime(added, '%Y-%m-%dT%H:%M:%S.%fZ') AS at FROM runs
WHERE role = $role AND seed IS NOT DISTINCT FROM $seed AND blend IS NOT DISTINCT FROM $blend AND budget IS NOT DISTINCT FROM $budget
  AND blend IS NOT NULL
ORDER BY added DESC, digest;
