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
)
SELECT models.digest AS model,
       coalesce(named.name, of_unit.name,
                CASE role WHEN 'reference' THEN mixture || ' [' || coalesce(budget || ' budget ', '') || 'reference]' END,
                left(models.digest, 12)) AS label,
       coalesce(role, 'other') AS role, seed, mixture, budget, blend, removed
FROM models
LEFT JOIN latest ON latest.model = models.digest
LEFT JOIN named ON named.model = models.digest
LEFT JOIN of_unit ON of_unit.model = models.digest;
COMMENT ON VIEW model_labels IS 'Each model with its name (or short digest), role, seed and training mixture';

CREATE VIEW tokenizers AS
SELECT tokenizer AS digest, count(*) AS models FROM models WHERE tokenizer IS NOT NULL GROUP BY tokenizer;
COMMENT ON VIEW tokenizers IS 'Tokenizers by the digest of all that can change an encoding, with the number of models';

CREATE VIEW evalset_names AS
SELECT target AS evalset, min(name) AS name
FROM names WHERE space = 'evalset' AND current GROUP BY target;
COMMENT ON VIEW evalset_names IS 'Current name of each evalset';

CREATE VIEW scores AS
WITH subjects AS (
    SELECT subject, mixture AS label, 'mixture' AS kind, mixture, scheme, size, origin, seed, blend
    FROM mixtures
    UNION ALL
    SELECT model, label, role, mixture, NULL, NULL, NULL, seed, blend
    FROM model_labels
    WHERE NOT removed AND model NOT IN (SELECT subject FROM mixtures)
)
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

CREATE VIEW unions AS
WITH uniform AS (
    SELECT mixture, list_sort(list(partition)) AS members, min(units) = max(units) AS schemes_coincide
    FROM mixture_weights
    JOIN partitions ON partitions.digest = mixture_weights.partition
    GROUP BY mixture
    HAVING max(unit) = 0 AND count(DISTINCT (numerator, denominator)) = 1
), schemes AS (
    SELECT DISTINCT scheme FROM mixtures
)
SELECT mixtures.mixture, schemes.scheme, mixtures.seed, uniform.members,
       coalesce(evalset_names.name, left(evaluations.evalset, 12)) AS evalset,
       bits_per_byte(nll, bytes) AS bits_per_byte, protocols.max_length, protocols.dtype,
       evaluations.protocol, evaluations.evalset AS evalset_digest
FROM uniform
JOIN mixtures ON mixtures.digest = uniform.mixture
JOIN schemes ON schemes.scheme = mixtures.scheme OR schemes_coincide
JOIN evaluations ON evaluations.subject = mixtures.subject
JOIN protocols ON protocols.digest = evaluations.protocol
LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset
QUALIFY row_number() OVER (
    PARTITION BY uniform.members, schemes.scheme, mixtures.seed, evaluations.evalset, evaluations.protocol
    ORDER BY mixtures.added DESC, mixtures.digest) = 1;
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
LEFT JOIN model_labels ON model_labels.model = recipe_components.model;
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
