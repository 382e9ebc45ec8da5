-- Named analysis queries: `poolreg query NAME`. Each reads views and tables that users see.

-- name: leaderboard
-- Mixtures by bits per byte averaged over all evalsets on which they were measured.
SELECT label AS mixture, scheme, size, count(*) AS evalsets,
       avg(bits_per_byte) AS mean_bits_per_byte, exp(avg(loss)) AS geometric_mean_perplexity,
       max_length, dtype
FROM scores
WHERE kind = 'mixture'
GROUP BY subject, label, scheme, size, max_length, dtype
ORDER BY max_length, dtype, evalsets DESC, mean_bits_per_byte, mixture, scheme, subject;

-- name: best
-- The best mixture for each evalset.
WITH least AS (
    SELECT evalset_digest, protocol, min(bits_per_byte) AS least FROM scores WHERE kind = 'mixture' GROUP BY ALL
)
SELECT evalset, label AS mixture, scheme, size, bits_per_byte, perplexity, max_length, dtype
FROM scores
JOIN least USING (evalset_digest, protocol)
WHERE kind = 'mixture' AND bits_per_byte IS NOT DISTINCT FROM least
QUALIFY row_number() OVER (PARTITION BY evalset_digest, protocol ORDER BY size, label, scheme, subject) = 1
ORDER BY evalset;

-- name: best_per_size
-- The best mixture of each number of partitions, for each evalset.
WITH least AS (
    SELECT evalset_digest, protocol, size, min(bits_per_byte) AS least FROM scores WHERE kind = 'mixture' GROUP BY ALL
)
SELECT evalset, size, label AS mixture, scheme, bits_per_byte, perplexity, max_length, dtype
FROM scores
JOIN least USING (evalset_digest, protocol, size)
WHERE kind = 'mixture' AND bits_per_byte IS NOT DISTINCT FROM least
QUALIFY row_number() OVER (PARTITION BY evalset_digest, protocol, size ORDER BY label, scheme, subject) = 1
ORDER BY evalset, size;

-- name: marginal
-- Marginal contribution of each partition: mean change of bits per byte when it joins a uniform union (negative is better).
WITH measured AS MATERIALIZED (
    SELECT number, scheme, seed, evalset_digest, protocol, bits_per_byte, evalset, max_length, dtype FROM unions
), lenses AS MATERIALIZED (
    SELECT *, CAST(row_number() OVER () AS INTEGER) AS lens
    FROM (SELECT DISTINCT scheme, seed, evalset_digest, protocol, evalset, max_length, dtype FROM measured)
), scored AS MATERIALIZED (
    SELECT number, lens, bits_per_byte FROM measured JOIN lenses USING (scheme, seed, evalset_digest, protocol)
), known AS MATERIALIZED (
    SELECT DISTINCT number, numbers FROM union_mixtures
), pairs AS MATERIALIZED (
    SELECT joining.number AS joining, others.number AS others, joined
    FROM (SELECT *, unnest(numbers) AS joined FROM known) AS joining
    JOIN known AS others ON others.numbers = list_filter(joining.numbers, lambda number: number <> joined)
), changes AS (
    SELECT joining.lens, joined, joining.bits_per_byte - others.bits_per_byte AS change
    FROM pairs
    JOIN scored AS joining ON joining.number = pairs.joining
    JOIN scored AS others ON others.number = pairs.others AND others.lens = joining.lens
), summed AS (
    SELECT lens, joined, count(*) AS pairs, sum(change) AS total, count(change) AS known, min(change) AS least, max(change) AS most
    FROM changes GROUP BY ALL
)
SELECT evalset, scheme, coalesce(names.name, left(partition, 12)) AS partition,
       sum(pairs)::BIGINT AS pairs, sum(total) / sum(known) AS mean_change, min(least) AS best_change, max(most) AS worst_change,
       max_length, dtype
FROM summed
JOIN lenses USING (lens)
JOIN (SELECT digest AS partition, row_number() OVER (ORDER BY digest) AS joined FROM partitions) USING (joined)
LEFT JOIN names ON names.target = partition AND names.space = 'partition' AND names.current
GROUP BY ALL
ORDER BY max_length, dtype, evalset, scheme, mean_change, 3;

-- name: leave_one_out
-- What the largest measured union loses without each of its partitions (positive: it is missed).
WITH measured AS MATERIALIZED (
    SELECT number, size, scheme, seed, evalset_digest, protocol, bits_per_byte, evalset, max_length, dtype FROM unions
), sizes AS (
    SELECT scheme, seed, evalset_digest, protocol, max(size) AS size FROM measured GROUP BY ALL
), largest AS (
    SELECT measured.* FROM measured JOIN sizes USING (scheme, seed, evalset_digest, protocol, size)
    -- Of several the first: unions are numbered in the order of their members.
    QUALIFY number = min(number) OVER (PARTITION BY scheme, seed, evalset_digest, protocol)
), known AS MATERIALIZED (
    SELECT DISTINCT number, numbers FROM union_mixtures
), pairs AS (
    SELECT whole.number, others.number AS others, taken
    FROM (SELECT *, unnest(numbers) AS taken FROM known WHERE number IN (SELECT number FROM largest)) AS whole
    JOIN known AS others ON others.numbers = list_filter(whole.numbers, lambda number: number <> taken)
)
SELECT largest.evalset, largest.scheme, coalesce(names.name, left(partition, 12)) AS left_out,
       largest.bits_per_byte AS with_it, others.bits_per_byte AS without_it,
       others.bits_per_byte - largest.bits_per_byte AS loss_without,
       largest.max_length, largest.dtype
FROM largest
JOIN pairs USING (number)
JOIN measured AS others
  ON others.number = pairs.others AND others.scheme = largest.scheme AND others.seed = largest.seed
 AND others.evalset_digest = largest.evalset_digest AND others.protocol = largest.protocol
JOIN (SELECT digest AS partition, row_number() OVER (ORDER BY digest) AS taken FROM partitions) USING (taken)
LEFT JOIN names ON names.target = partition AND names.space = 'partition' AND names.current
ORDER BY largest.max_length, largest.dtype, largest.evalset, largest.scheme, loss_without DESC, 3;

-- name: missing
-- Cells that were never measured: known mixtures without a score on a current evalset.
SELECT mixtures.mixture, mixtures.scheme, evalset_names.name AS evalset
FROM mixtures
CROSS JOIN evalset_names
JOIN evalsets ON evalsets.digest = evalset_names.evalset AND NOT evalsets.removed
WHERE NOT EXISTS (
    SELECT 1 FROM evaluations
    WHERE evaluations.subject = mixtures.subject AND evaluations.evalset = evalset_names.evalset)
ORDER BY ALL;

-- name: proxies
-- Each proxy beside the model really trained on its mixture.
SELECT mixture, scheme, evalset, budget, proxy_loss, reference_loss, proxy_loss - reference_loss AS difference,
       proxy_perplexity, reference_perplexity
FROM proxy_pairs
ORDER BY evalset, budget, mixture;

-- name: correlation
-- Correlation of proxy and reference losses within each evalset and budget: of the merged model, and of the weighted mean of the unit models' losses as the naive alternative.
WITH mean_losses AS (
    SELECT recipe_components.recipe AS subject, evaluations.evalset, evaluations.protocol,
           sum(recipe_components.weight * loss(nll, tokens)) AS mean_loss, count(*) AS measured
    FROM recipe_components
    JOIN evaluations ON evaluations.subject = recipe_components.model
    WHERE recipe_components.recipe IN (SELECT proxy_subject FROM proxy_pairs)
    GROUP BY ALL
)
SELECT proxy_pairs.evalset, budget, count(*) AS "references",
       corr(proxy_loss, reference_loss) AS merged, corr(mean_loss, reference_loss) AS mean_of_losses,
       avg(proxy_loss - reference_loss) AS merged_minus_reference
FROM proxy_pairs
LEFT JOIN mean_losses ON mean_losses.subject = proxy_subject AND mean_losses.evalset = evalset_digest
 AND mean_losses.protocol = proxy_pairs.protocol
 AND measured = (SELECT components FROM recipes WHERE recipes.digest = proxy_subject)
GROUP BY ALL
ORDER BY budget, evalset;

-- name: ledger
-- Tokens trained and scored in this pool, and the training that averages made unnecessary.
SELECT * FROM ledger;

-- name: variants
-- Compressed models with their parents, sizes and how they were made.
SELECT variant, parent, method, target, achieved, parameters, bytes, shared_bytes, calibrated_on, seconds
FROM variant_list
ORDER BY parent, target, achieved, method, variant;

-- name: pareto
-- Size against quality of every measured variant beside its parent; calibrated_on_it flatters.
SELECT parent, evalset, label, method, achieved, bytes, bits_per_byte, perplexity, perplexity_increase,
       on_front, calibrated_on_it, max_length, dtype
FROM pareto
ORDER BY parent, evalset, max_length, dtype, bytes DESC, bits_per_byte, label;

-- name: ranking
-- Does the ranking survive compression? Rank correlation (Spearman) between the losses of models or mixtures and those of their variants, for each way of compressing; with fewer than three it is left out.
WITH pairs AS (
    SELECT variants.method, variants.target, variants.ratio, array_to_string(variants.without, '+') AS without,
           small.evalset, small.protocol,
           loss(whole.nll, whole.tokens) AS whole_loss, loss(small.nll, small.tokens) AS small_loss
    FROM variants
    JOIN models ON models.digest = variants.model AND NOT models.removed
    JOIN evaluations AS small ON small.subject = variants.model
    JOIN evaluations AS whole
      ON whole.subject = variants.parent AND whole.evalset = small.evalset AND whole.protocol = small.protocol
), ranked AS (
    -- Equal losses share the mean of their ranks.
    SELECT *, rank() OVER (PARTITION BY method, target, ratio, without, evalset, protocol ORDER BY whole_loss)
              + (count(*) OVER (PARTITION BY method, target, ratio, without, evalset, protocol, whole_loss) - 1) / 2 AS whole_rank,
           rank() OVER (PARTITION BY method, target, ratio, without, evalset, protocol ORDER BY small_loss)
              + (count(*) OVER (PARTITION BY method, target, ratio, without, evalset, protocol, small_loss) - 1) / 2 AS small_rank
    FROM pairs
)
SELECT coalesce(min(evalset_names.name), left(ranked.evalset, 12)) AS evalset, method, target, ratio, without,
       count(*) AS models, if(count(*) >= 3, corr(whole_rank, small_rank), NULL) AS rank_correlation,
       avg(small_loss - whole_loss) AS mean_loss_increase,
       min(whole_loss) = arg_min(whole_loss, (small_loss, whole_loss)) AS same_best, protocols.max_length, protocols.dtype
FROM ranked
JOIN protocols ON protocols.digest = ranked.protocol
LEFT JOIN evalset_names ON evalset_names.evalset = ranked.evalset
GROUP BY ranked.evalset, ranked.protocol, method, target, ratio, without, protocols.max_length, protocols.dtype
ORDER BY max_length, dtype, method, target, ratio, without, 1;
