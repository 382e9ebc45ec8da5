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
-- Document digests of every partition.
SELECT digest, content FROM partitions WHERE NOT removed;

-- name: evalset_contents
-- Document digests of every evalset.
SELECT digest, content FROM evalsets WHERE NOT removed;

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
SELECT DISTINCT runs.model AS digest, label FROM runs
JOIN model_labels ON model_labels.model = runs.model
WHERE runs.role = 'seed' AND NOT removed
ORDER BY label;

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
SELECT runs.model, runs.budget, label FROM runs
JOIN model_labels ON model_labels.model = runs.model AND NOT removed
WHERE runs.role = 'reference' AND runs.blend = $blend AND runs.seed = $seed
QUALIFY row_number() OVER (PARTITION BY runs.budget ORDER BY runs.added DESC, runs.digest) = 1
ORDER BY runs.budget;

-- name: evaluations
-- Memoised evaluations by their keys.
SELECT digest, subject, evalset, protocol, nll, tokens, bytes, documents, document_scores
FROM evaluations WHERE digest IN (SELECT unnest($digests));

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
