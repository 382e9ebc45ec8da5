-- Statements behind the cards of published pools and models.

-- name: totals
-- What a pool comes to: how much was trained and measured.
SELECT ledger.*,
       (SELECT count(DISTINCT subject) FROM evaluations JOIN mixtures USING (subject)) AS mixtures_measured
FROM ledger;

-- name: cells
-- Scores of some subjects ($3) on some evalsets ($2) under a protocol ($1).
SELECT subject, evalset_digest, any_value(bits_per_byte) AS bits_per_byte, any_value(perplexity) AS perplexity
FROM scores
WHERE protocol = $1 AND evalset_digest IN (SELECT unnest($2)) AND subject IN (SELECT unnest($3))
GROUP BY subject, evalset_digest
ORDER BY subject, evalset_digest;

-- name: scores
-- All scores of one model or average ($1), beside those of what it was made from ($2).
SELECT coalesce(evalset_names.name, left(own.evalset, 12)) AS evalset, own.evalset AS evalset_digest,
       bits_per_byte(own.nll, own.bytes) AS bits_per_byte, perplexity(own.nll, own.tokens) AS perplexity,
       bits_per_byte(parent.nll, parent.bytes) AS parent_bits_per_byte, protocols.max_length, protocols.dtype
FROM evaluations AS own
JOIN protocols ON protocols.digest = own.protocol
JOIN evalsets ON evalsets.digest = own.evalset AND NOT evalsets.removed
LEFT JOIN evalset_names ON evalset_names.evalset = own.evalset
LEFT JOIN evaluations AS parent
  ON parent.subject = $2 AND parent.evalset = own.evalset AND parent.protocol = own.protocol
WHERE own.subject = $1
ORDER BY 1, 2, protocols.max_length DESC, protocols.dtype, own.protocol;
