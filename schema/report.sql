-- Statements behind the report's figures and tables. $1 is a protocol, $2 a list of evalset
-- digests, $3 a seed model: rows of one report are comparable with each other.

-- name: lenses
-- The ways in which mixtures were measured, the most used first.
SELECT scores.seed, coalesce(model_labels.label, left(scores.seed, 12)) AS seed_label, protocol, max_length, dtype,
       count(DISTINCT (subject, evalset_digest)) AS evaluations
FROM scores
LEFT JOIN model_labels ON model_labels.model = scores.seed
WHERE kind = 'mixture' AND scores.seed IS NOT NULL
GROUP BY ALL
ORDER BY evaluations DESC, seed_label, max_length DESC, protocol, scores.seed;

-- name: measured
-- The evalsets on which a seed's mixtures were measured under a protocol.
SELECT evalset_digest AS digest, min(evalset) AS name
FROM scores
JOIN evalsets ON evalsets.digest = evalset_digest AND NOT evalsets.removed
WHERE kind = 'mixture' AND protocol = $1 AND seed = $2
GROUP BY evalset_digest
ORDER BY name, digest;

-- name: newest
-- How many evaluations there are, and when the last record was written.
SELECT (SELECT count(*) FROM evaluations) AS evaluations,
       greatest((SELECT max(added) FROM evaluations), (SELECT max(added) FROM runs), (SELECT max(added) FROM names)) AS newest;

-- name: leaderboard
-- Mixtures by bits per byte averaged over the evalsets on which they were measured.
WITH shown AS (
    SELECT subject, mixture, scheme, size, origin FROM mixtures
    WHERE seed = $3
    QUALIFY row_number() OVER (PARTITION BY subject ORDER BY len(mixture), mixture, scheme) = 1
)
SELECT mixture, scheme, size, origin, count(*) AS evalsets,
       avg(bits_per_byte(nll, bytes)) AS mean_bits_per_byte, exp(avg(loss(nll, tokens))) AS geometric_mean_perplexity,
       subject
FROM shown
JOIN evaluations USING (subject)
WHERE protocol = $1 AND evalset IN (SELECT unnest($2))
GROUP BY subject, mixture, scheme, size, origin
ORDER BY evalsets DESC, mean_bits_per_byte, mixture, scheme;

-- name: seed
-- The seed model's own scores.
SELECT coalesce(evalset_names.name, left(evaluations.evalset, 12)) AS evalset, bits_per_byte(nll, bytes) AS bits_per_byte
FROM evaluations
LEFT JOIN evalset_names ON evalset_names.evalset = evaluations.evalset
WHERE protocol = $1 AND evaluations.evalset IN (SELECT unnest($2)) AND subject = $3
ORDER BY 1;

-- name: best
-- The best mixture for each evalset, and its change against the seed model.
WITH measured AS (
    SELECT * FROM scores
    WHERE kind = 'mixture' AND protocol = $1 AND evalset_digest IN (SELECT unnest($2)) AND seed = $3
), least AS (
    SELECT evalset_digest, min(bits_per_byte) AS least FROM measured GROUP BY evalset_digest
)
SELECT measured.evalset, label AS mixture, scheme, size, bits_per_byte,
       bits_per_byte - bits_per_byte(start.nll, start.bytes) AS change_from_seed, perplexity
FROM measured
JOIN least USING (evalset_digest)
LEFT JOIN evaluations AS start
  ON start.subject = $3 AND start.evalset = evalset_digest AND start.protocol = measured.protocol
WHERE bits_per_byte IS NOT DISTINCT FROM least
QUALIFY row_number() OVER (PARTITION BY evalset_digest ORDER BY size, len(label), label, scheme) = 1
ORDER BY measured.evalset;

-- name: changes
-- Change of bits per byte against the seed model when trained on one partition alone (negative is better).
SELECT coalesce(names.name, left(members[1], 12)) AS partition, unions.evalset,
       any_value(bits_per_byte(start.nll, start.bytes)) AS seed_bits_per_byte,
       any_value(unions.bits_per_byte) AS bits_per_byte,
       any_value(unions.bits_per_byte - bits_per_byte(start.nll, start.bytes)) AS change
FROM unions
JOIN evaluations AS start
  ON start.subject = unions.seed AND start.evalset = unions.evalset_digest AND start.protocol = unions.protocol
LEFT JOIN names ON names.target = members[1] AND names.space = 'partition' AND names.current
WHERE unions.size = 1 AND unions.protocol = $1 AND evalset_digest IN (SELECT unnest($2)) AND unions.seed = $3
GROUP BY 1, 2
ORDER BY 1, 2;

-- name: pairs
-- Each proxy beside the model really trained on its mixture, in bits per byte.
SELECT evalset, coalesce(budget, 'unknown') AS budget, mixture, scheme,
       proxy_bits_per_byte AS proxy, reference_bits_per_byte AS reference,
       proxy_bits_per_byte - reference_bits_per_byte AS difference
FROM proxy_pairs
WHERE protocol = $1 AND evalset_digest IN (SELECT unnest($2)) AND origin <> 'adaptive'
  AND proxy_subject IN (SELECT subject FROM mixtures WHERE seed = $3)
QUALIFY row_number() OVER (PARTITION BY proxy_subject, reference_model, evalset_digest ORDER BY len(mixture), mixture, scheme) = 1
ORDER BY evalset, budget, mixture, scheme, reference_model;

-- name: weights
-- The weights of some subjects ($1) over partitions.
SELECT mixtures.subject, coalesce(names.name, left(partition, 12)) AS partition, sum(weight) AS weight
FROM mixture_weights
JOIN (
    SELECT digest, subject FROM mixtures WHERE subject IN (SELECT unnest($1))
    QUALIFY row_number() OVER (PARTITION BY subject ORDER BY len(mixture), mixture, scheme, digest) = 1
) AS mixtures ON mixtures.digest = mixture_weights.mixture
LEFT JOIN names ON names.target = partition AND names.space = 'partition' AND names.current
GROUP BY 1, 2
ORDER BY 1, 2;

-- name: pareto
-- Size against quality of every measured variant beside its parent; calibrated_on_it flatters.
SELECT parent, evalset, label AS variant, method, achieved, bytes, bits_per_byte, perplexity_increase,
       on_front, calibrated_on_it
FROM pareto
WHERE protocol = $1 AND evalset_digest IN (SELECT unnest($2))
ORDER BY parent, evalset, bytes DESC, bits_per_byte, label;

-- name: ledger
-- Tokens trained and scored in this pool, and the training that averages made unnecessary.
SELECT * FROM ledger;

-- name: missing
-- Cells that were never measured: known mixtures of a seed without a score on an evalset.
SELECT mixtures.mixture, mixtures.scheme, coalesce(evalset_names.name, left(asked.evalset, 12)) AS evalset
FROM mixtures
CROSS JOIN (SELECT unnest($2) AS evalset) AS asked
LEFT JOIN evalset_names ON evalset_names.evalset = asked.evalset
WHERE mixtures.seed = $3
  AND NOT EXISTS (
    SELECT 1 FROM evaluations
    WHERE evaluations.subject = mixtures.subject AND evaluations.evalset = asked.evalset AND evaluations.protocol = $1)
ORDER BY ALL;
