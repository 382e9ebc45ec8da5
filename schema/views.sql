-- What users query. Views name things; tables hold digests.

CREATE VIEW model_labels AS
WITH latest AS (
    SELECT model, role, seed, mixture, budget, blend
    FROM runs
    QUALIFY row_number() OVER (
        PARTITION BY model
        ORDER BY CASE role WHEN 'seed' THEN 0 WHEN 'unit' THEN 1 WHEN 'reference' THEN 2 ELSE 3 END, added DESC, digest) = 1
), named AS (
    SELECT target AS model, name
    FROM names
    WHERE space = 'model' AND current
    QUALIFY row_number() OVER (PARTITION BY target ORDER BY added, name) = 1
), of_unit AS (
    SELECT model_units.model, min(partition_names.name || '/' || units.unit) AS name
    FROM model_units
    JOIN runs ON runs.digest = model_units.run AND runs.role = 'unit'
    JOIN units ON units.digest = model_units.unit
    JOIN names AS partition_names
      ON partition_names.target = units.partition AND partition_names.space = 'partition' AND partition_names.current
    GROUP BY model_units.model
), of_variant AS (
    SELECT model, parent_label || ' [-' || round(100 * achieved, 1) || '% ' || method ||
           CASE target WHEN 'full' THEN '' ELSE ' ' || target END || ']' AS name
    FROM variants
    QUALIFY row_number() OVER (PARTITION BY model ORDER BY added, digest) = 1
)
SELECT models.digest AS model,
       coalesce(named.name, of_unit.name, of_variant.name,
                CASE role WHEN 'reference' THEN mixture || ' [' || coalesce(budget || ' budget ', '') || 'reference]' END,
                left(models.digest, 12)) AS label,
       coalesce(role, 'other') AS role, seed, mixture, budget, blend, removed
FROM models
LEFT JOIN latest ON latest.model = models.digest
LEFT JOIN named ON named.model = models.digest
LEFT JOIN of_unit ON of_unit.model = models.digest
LEFT JOIN of_variant ON of_variant.model = models.digest;
COMMENT ON VIEW model_labels IS 'Each model with its name (or short digest), role, seed and training mixture';

CREATE VIEW tokenizers AS
SELECT tokenizer AS digest, count(*) AS models FROM models WHERE tokenizer IS NOT NULL GROUP BY tokenizer;
COMMENT ON VIEW tokenizers IS 'Tokenizers by the digest of all that can change an encoding, with the number of models';

CREATE VIEW evalset_names AS
SELECT target AS evalset, min(name) AS name
FROM names WHERE space = 'evalset' AND current GROUP BY target;
COMMENT ON VIEW evalset_names IS 'Current name of each evalset';

CREATE VIEW subjects AS
SELECT subject, mixture AS label, 'mixture' AS kind, mixture, scheme, size, origin, seed, blend
FROM mixtures
UNION ALL
SELECT model, label, role, mixture, NULL, NULL, NULL, seed, blend
FROM model_labels
WHERE NOT removed AND model NOT IN (SELECT subject FROM mixtures);
COMMENT ON VIEW subjects IS 'What can be measured: mixtures, and models that stand for no mixture, with their labels';

CREATE VIEW scores AS
SELECT subjects.label, subjects.kind, subjects.mixture, subjects.scheme, subjects.size,
       coalesce(evalset_names.name, left(evaluations.evalset, 12)) AS evalset,
       perplexity(nll, tokens) AS perplexity,
       bits_per_byte(nll, bytes) AS bits_per_byte,
       loss(nll, tokens) AS loss,
       nll, tokens, bytes, documents,
       protocols.max_length, protocols.dtype,
       subjects.origin, subjects.seed, evaluations.subject, subjects.blend,
       evaluations.protocol, evaluations.evalset AS evalset_digest
FROM evaluations
JOIN subjects ON subjects.subject = evaluations.subject
JOIN protocols ON protocols.digest = evaluations.protocol
LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset;
COMMENT ON VIEW scores IS 'Every evaluation with the label of its mixture or model; compare rows of one protocol only';

CREATE VIEW raced AS
SELECT subjects.label, subjects.mixture, subjects.scheme,
       coalesce(evalset_names.name, left(laps.evalset, 12)) AS evalset,
       bits_per_byte(sum(laps.nll), sum(laps.bytes)) AS bits_per_byte,
       sum(laps.documents)::BIGINT AS documents, sum(laps.tokens)::BIGINT AS tokens, sum(laps.bytes)::BIGINT AS bytes,
       max(laps.lap) + 1 AS laps,
       subjects.seed, laps.subject, laps.protocol, laps.evalset AS evalset_digest
FROM laps
JOIN subjects ON subjects.subject = laps.subject
LEFT JOIN evalset_names ON evalset_names.evalset = laps.evalset
LEFT JOIN evaluations ON evaluations.subject = laps.subject AND evaluations.evalset = laps.evalset AND evaluations.protocol = laps.protocol
WHERE evaluations.digest IS NULL
GROUP BY ALL;
COMMENT ON VIEW raced IS 'Mixtures that stopped in a race, on the part of each evalset that they were scored on; not to be compared with scores of whole evalsets';

CREATE VIEW task_results AS
SELECT subject, measure, task, metric, filter, value, stderr, higher_is_better, n_shot, samples, sample_limit,
       task_hash, task_version, harness, harness_version, measured
FROM task_scores
QUALIFY row_number() OVER (
    PARTITION BY subject, measure ORDER BY measured DESC NULLS LAST, added DESC, digest) = 1;
COMMENT ON VIEW task_results IS 'The latest score of each model or recipe on each task, by the time of measuring';

CREATE VIEW measures AS
SELECT label, kind, mixture, scheme, size, origin, seed, blend, evalset AS measure, 'bits_per_byte' AS metric,
       bits_per_byte AS value, NULL::DOUBLE AS stderr, false AS higher_is_better, 'evalset' AS source,
       subject, protocol, evalset_digest AS measure_digest
FROM scores
UNION ALL
SELECT label, kind, mixture, scheme, size, origin, seed, blend, task,
       CASE filter WHEN 'none' THEN metric ELSE metric || ',' || filter END,
       value, stderr, higher_is_better, 'task', subject, NULL, measure
FROM task_results
JOIN subjects USING (subject);
COMMENT ON VIEW measures IS 'All that mixtures and models are measured by, evalsets and tasks in one shape; compare rows with one measure_digest and, for evalsets, one protocol';

CREATE VIEW union_mixtures AS
WITH numbered AS (
    SELECT digest, units, CAST(row_number() OVER (ORDER BY digest) AS INTEGER) AS number FROM partitions
), uniform AS (
    SELECT mixture AS digest, list_sort(list(partition)) AS members, list_sort(list(number)) AS numbers,
           min(units) = max(units) AS schemes_coincide
    FROM mixture_weights
    JOIN numbered ON numbered.digest = mixture_weights.partition
    GROUP BY mixture
    HAVING max(unit) = 0 AND min(numerator) = max(numerator) AND min(denominator) = max(denominator)
), schemes AS (
    SELECT DISTINCT scheme FROM mixtures
)
SELECT mixtures.mixture, schemes.scheme, mixtures.seed, uniform.members, uniform.numbers,
       CAST(dense_rank() OVER (ORDER BY uniform.numbers) AS INTEGER) AS number,
       len(uniform.numbers) AS size, mixtures.subject, mixtures.added, mixtures.digest
FROM uniform
JOIN mixtures ON mixtures.digest = uniform.digest
JOIN schemes ON schemes.scheme = mixtures.scheme OR schemes_coincide;
COMMENT ON VIEW union_mixtures IS 'Mixtures that are uniform unions of whole partitions, with their partitions as a sorted list of digests and, shorter, of places in the sorted list of all partitions; where micro and macro coincide a row stands under both';

CREATE VIEW unions AS
WITH replaced AS (
    SELECT old.digest, old.scheme, evaluations.evalset, evaluations.protocol
    FROM union_mixtures AS old
    JOIN union_mixtures AS new
      ON new.numbers = old.numbers AND new.scheme = old.scheme AND new.seed IS NOT DISTINCT FROM old.seed
     AND (new.added > old.added OR (new.added = old.added AND new.digest < old.digest))
    JOIN evaluations ON evaluations.subject = new.subject
)
SELECT asked.mixture, asked.scheme, asked.seed, asked.members,
       coalesce(evalset_names.name, left(evaluations.evalset, 12)) AS evalset,
       bits_per_byte(nll, bytes) AS bits_per_byte, protocols.max_length, protocols.dtype,
       evaluations.protocol, evaluations.evalset AS evalset_digest, asked.size, asked.number
FROM union_mixtures AS asked
JOIN evaluations ON evaluations.subject = asked.subject
JOIN protocols ON protocols.digest = evaluations.protocol
LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset
ANTI JOIN replaced
  ON replaced.digest = asked.digest AND replaced.scheme = asked.scheme
 AND replaced.evalset = evaluations.evalset AND replaced.protocol = evaluations.protocol;
COMMENT ON VIEW unions IS 'Scores of uniform unions of whole partitions, with their partitions as a sorted list of digests; where micro and macro coincide a row stands under both, and models trained again replace the old';

CREATE VIEW proxy_pairs AS
SELECT proxy.label AS mixture, proxy.scheme, proxy.size, proxy.origin, proxy.evalset, runs.budget,
       model_labels.label AS reference,
       proxy.loss AS proxy_loss, loss(ref.nll, ref.tokens) AS reference_loss,
       proxy.perplexity AS proxy_perplexity, perplexity(ref.nll, ref.tokens) AS reference_perplexity,
       proxy.bits_per_byte AS proxy_bits_per_byte, bits_per_byte(ref.nll, ref.bytes) AS reference_bits_per_byte,
       proxy.protocol, proxy.evalset_digest, proxy.subject AS proxy_subject, runs.model AS reference_model
FROM scores AS proxy
JOIN runs ON runs.role = 'reference' AND runs.blend = proxy.blend AND runs.seed = proxy.seed
JOIN model_labels ON model_labels.model = runs.model AND NOT model_labels.removed
JOIN evaluations AS ref ON ref.subject = runs.model AND ref.evalset = proxy.evalset_digest AND ref.protocol = proxy.protocol
WHERE proxy.kind = 'mixture' AND runs.model <> proxy.subject;
COMMENT ON VIEW proxy_pairs IS 'The proxy of a mixture beside a model really trained on that mixture';

CREATE VIEW variant_list AS
SELECT model_labels.label AS variant, parents.label AS parent, variants.method, variants.target,
       variants.ratio, variants.achieved, variants.without, models.parameters, models.bytes,
       models.bytes / parent_bytes AS bytes_share, shared_bytes,
       coalesce(evalset_names.name, partition_names.name, left(calibrations.text, 12)) AS calibrated_on,
       calibrations.tokens AS calibration_tokens, variants.sequential, variants.seconds,
       variants.added, variants.model, variants.parent AS parent_digest, variants.digest,
       calibrations.text AS calibration_text
FROM variants
JOIN models ON models.digest = variants.model AND NOT models.removed
JOIN model_labels ON model_labels.model = variants.model
JOIN calibrations ON calibrations.digest = variants.calibration
JOIN (
    SELECT subject, min(mixture) AS label FROM mixtures WHERE subject NOT IN (SELECT digest FROM models) GROUP BY subject
    UNION ALL SELECT model, label FROM model_labels
) AS parents ON parents.subject = variants.parent
LEFT JOIN evalset_names ON evalset_names.evalset = calibrations.text
LEFT JOIN (SELECT target, min(name) AS name FROM names WHERE space = 'partition' AND current GROUP BY target) AS partition_names
  ON partition_names.target = calibrations.text;
COMMENT ON VIEW variant_list IS 'Compressed models with their parents, sizes and how they were made';

CREATE VIEW pareto AS
WITH candidates AS (
    SELECT parent_digest AS root, model AS subject, variant AS label, method, target, achieved, bytes, parameters, calibration_text
    FROM variant_list
    UNION ALL
    SELECT DISTINCT variants.parent, variants.parent, variant_list.parent, 'dense', NULL, 0.0, parent_bytes, parent_parameters, NULL
    FROM variants JOIN variant_list ON variant_list.digest = variants.digest
), measured AS (
    SELECT candidates.*, coalesce(evalset_names.name, left(evaluations.evalset, 12)) AS evalset,
           bits_per_byte(nll, evaluations.bytes) AS bits_per_byte, perplexity(nll, tokens) AS perplexity,
           evaluations.evalset = calibration_text AS calibrated_on_it,
           evaluations.evalset AS evalset_digest, evaluations.protocol
    FROM candidates
    JOIN evaluations ON evaluations.subject = candidates.subject
    LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset
)
SELECT roots.label AS parent, measured.label, measured.method, measured.target, measured.achieved,
       measured.bytes, measured.parameters, measured.evalset, measured.bits_per_byte, measured.perplexity,
       measured.perplexity - roots.perplexity AS perplexity_increase,
       coalesce(measured.calibrated_on_it, false) AS calibrated_on_it,
       NOT EXISTS (
           SELECT 1 FROM measured AS other
           WHERE other.root = measured.root AND other.evalset_digest = measured.evalset_digest AND other.protocol = measured.protocol
             AND other.bytes <= measured.bytes AND other.bits_per_byte <= measured.bits_per_byte
             AND (other.bytes < measured.bytes OR other.bits_per_byte < measured.bits_per_byte)) AS on_front,
       protocols.max_length, protocols.dtype, measured.subject, measured.root, measured.evalset_digest, measured.protocol
FROM measured
JOIN measured AS roots
  ON roots.root = measured.root AND roots.subject = roots.root AND roots.evalset_digest = measured.evalset_digest AND roots.protocol = measured.protocol
JOIN protocols ON protocols.digest = measured.protocol;
COMMENT ON VIEW pareto IS 'Size against bits per byte of variants and of what they were made from; on_front: nothing as small is as good; calibrated_on_it: the evalset is the calibration text, which flatters';

CREATE VIEW lineage AS
SELECT runs.model AS child, child_labels.label AS child_label, runs.seed AS parent,
       parent_labels.label AS parent_label, 'trained from' AS relation, NULL::DOUBLE AS weight
FROM runs
JOIN model_labels AS child_labels ON child_labels.model = runs.model
LEFT JOIN model_labels AS parent_labels ON parent_labels.model = runs.seed
WHERE runs.seed IS NOT NULL
UNION ALL
SELECT recipe, coalesce(mixtures.mixture, left(recipe, 12)), recipe_components.model, label, 'averages', weight
FROM recipe_components
LEFT JOIN mixtures ON mixtures.subject = recipe
LEFT JOIN model_labels ON model_labels.model = recipe_components.model
UNION ALL
SELECT model, variant, parent_digest, parent, 'compressed from', NULL
FROM variant_list
UNION ALL
SELECT builds.model, model_labels.label, builds.subject, coalesce(mixtures.mixture, left(builds.subject, 12)), 'keeps', NULL
FROM builds
JOIN model_labels ON model_labels.model = builds.model
LEFT JOIN (SELECT subject, min(mixture) AS mixture FROM mixtures GROUP BY subject) AS mixtures ON mixtures.subject = builds.subject;
COMMENT ON VIEW lineage IS 'What each model and average was made from';

CREATE VIEW ledger AS
WITH trained AS (
    SELECT count(*) AS models, coalesce(sum(tokens), 0) AS tokens, coalesce(sum(seconds), 0) AS seconds
    FROM runs WHERE how = 'trained'
), answered AS (
    SELECT count(*) AS mixtures, coalesce(sum(unit_tokens), 0) AS tokens
    FROM (
        SELECT DISTINCT ON (blend, seed) mixtures.blend, mixtures.seed, unit_tokens
        FROM mixtures
        WHERE subject IN (SELECT subject FROM evaluations)
          AND subject NOT IN (SELECT digest FROM models)
          AND (blend, seed) NOT IN (SELECT (blend, seed) FROM runs WHERE role = 'reference' AND blend IS NOT NULL AND seed IS NOT NULL)
    )
), scored AS (
    SELECT count(*) AS evaluations, coalesce(sum(tokens), 0) AS tokens, coalesce(sum(seconds), 0) AS seconds
    FROM evaluations
)
SELECT trained.models AS models_trained, trained.tokens AS tokens_trained, trained.seconds AS training_seconds,
       answered.mixtures AS trainings_avoided, answered.tokens AS tokens_avoided,
       scored.evaluations AS evaluations_memoised, scored.tokens AS tokens_scored, scored.seconds AS scoring_seconds
FROM trained, answered, scored;
COMMENT ON VIEW ledger IS 'Tokens trained and scored in this pool, and the training that averages made unnecessary';

CREATE VIEW history AS
WITH namings AS (
    SELECT *, lag(target) OVER earlier AS before, lag(parent) OVER earlier AS parent_before
    FROM names
    WINDOW earlier AS (PARTITION BY space, name ORDER BY added, record)
), tombstones AS (
    SELECT *, coalesce(lag(removed) OVER (PARTITION BY kind, target ORDER BY added, record), false) AS before
    FROM removals
), called AS (
    SELECT model AS target, label AS name, false AS named FROM model_labels WHERE model NOT IN (SELECT target FROM names)
    UNION ALL
    SELECT target, arg_min(name, (added, record)), true FROM names GROUP BY target
), events AS (
    SELECT added, CASE WHEN before IS NULL OR before = target THEN 'named' ELSE 'moved' END AS event,
           space AS kind, name, target AS digest, nullif(before, target) AS from_digest,
           CASE WHEN before <> target THEN 'from ' || left(before, 12)
                WHEN parent IS NOT NULL THEN 'under ' || parent
                WHEN parent_before IS NOT NULL THEN 'under nothing' END AS detail, record
    FROM namings
    WHERE before IS DISTINCT FROM target OR parent_before IS DISTINCT FROM parent
    UNION ALL
    SELECT tombstones.added, if(removed, 'removed', 'restored'), kind, called.name, target, NULL, NULL, record
    FROM tombstones LEFT JOIN called USING (target)
    WHERE removed <> before
    UNION ALL
    SELECT added, 'added', 'partition', called.name, digest, NULL, _many(documents, 'document') || ', ' || _many(units, 'unit'), digest
    FROM partitions LEFT JOIN called ON called.target = digest
    UNION ALL
    SELECT added, 'added', 'evalset', called.name, digest, NULL, _many(documents, 'document'), digest
    FROM evalsets LEFT JOIN called ON called.target = digest
    UNION ALL
    SELECT added, 'added', 'model', called.name, digest, NULL, NULL, digest
    FROM models LEFT JOIN called ON called.target = digest
    WHERE digest NOT IN (SELECT model FROM runs)
    UNION ALL
    SELECT runs.added, how, 'model', called.name, runs.model, runs.seed,
           concat_ws(' ', runs.role, CASE WHEN called.named THEN 'on ' || runs.mixture END, 'from ' || seeds.label), runs.digest
    FROM runs
    LEFT JOIN called ON called.target = runs.model
    LEFT JOIN model_labels AS seeds ON seeds.model = runs.seed
    WHERE NOT (how = 'merged' AND runs.model IN (SELECT model FROM builds))
      AND NOT (how = 'compressed' AND runs.model IN (SELECT model FROM variants))
    UNION ALL
    SELECT variants.added, 'compressed', 'model', called.name, variants.model, parent,
           'from ' || parent_label || ', -' || round(100 * achieved, 1) || '% ' || method, digest
    FROM variants LEFT JOIN called ON called.target = variants.model
    UNION ALL
    SELECT builds.added, 'merged', 'model', called.name, builds.model, builds.subject,
           'average of ' || coalesce(asked.mixture, left(builds.subject, 12)), builds.digest
    FROM builds
    LEFT JOIN called ON called.target = builds.model
    LEFT JOIN (SELECT subject, min(mixture) AS mixture FROM mixtures GROUP BY subject) AS asked ON asked.subject = builds.subject
    UNION ALL
    SELECT added, 'trusted', 'model', called.name, model, NULL, 'its own code may run', record
    FROM trusts LEFT JOIN called ON called.target = model
    UNION ALL
    SELECT added, if(direction = 'push', 'pushed', 'pulled'), 'pool', NULL, NULL, NULL,
           concat(if(direction = 'push', 'to ', 'from '), place, '@' || nullif(left(version, 12), ''), ': ', _many(records, 'record'), ', ', _many(objects, 'object')), record
    FROM transfers
    UNION ALL
    SELECT max(added), 'measured', 'pool', NULL, NULL, NULL,
           _many(count(*), 'evaluation') || ' of ' || _many(count(DISTINCT subject), 'subject'), NULL
    FROM evaluations GROUP BY CAST(added AS DATE)
)
SELECT added, event, kind, name, digest, from_digest, detail, record FROM events;
COMMENT ON VIEW history IS 'What happened in the pool and when: names given (named) and given to something else (moved), what was added, trained, compressed, merged, removed, restored, trusted, pushed and pulled; evaluations are one row (measured) a day. digest: what it happened to; from_digest: what the name meant before, the seed, the parent or the recipe';
