-- Measures over the stored sums. Sums are stored and ratios are computed, so rows can be added up.
CREATE MACRO perplexity(nll, tokens) AS exp(nll / nullif(tokens, 0));
COMMENT ON MACRO perplexity IS 'exp(nll / tokens)';
CREATE MACRO bits_per_byte(nll, bytes) AS nll / (ln(2) * nullif(bytes, 0));
COMMENT ON MACRO bits_per_byte IS 'nll / (ln 2 · bytes)';
CREATE MACRO loss(nll, tokens) AS nll / nullif(tokens, 0);
COMMENT ON MACRO loss IS 'nll / tokens, nats a token';

CREATE MACRO _many(number, noun) AS number || ' ' || noun || if(number = 1, '', 's');
COMMENT ON MACRO _many IS 'A number with its noun: 1 model, 2 models';

-- How well one column predicts another, and by how much two differ: aggregates over the rows of a
-- group. Rows with a NULL on either side are left out; what is not defined (too few rows, nothing
-- varies) is NULL. A macro takes no FILTER: leave rows out with WHERE, or make them NULL with
-- spearman(CASE WHEN … THEN x END, y). NaN counts as the largest value. Names that begin with an
-- underscore are parts of the others; list_transform([value], lambda name: …)[1] names a value.
-- Each macro holds its one aggregate itself, or OVER refuses it; and entry['x'] is not written
-- entry.x, which HAVING takes for a column.

CREATE MACRO _xs(pairs) AS list_transform(pairs, lambda pair: pair['x']);
COMMENT ON MACRO _xs IS 'First entries of a list of pairs';

CREATE MACRO _ys(pairs) AS list_transform(pairs, lambda pair: pair['y']);
COMMENT ON MACRO _ys IS 'Second entries of a list of pairs';

-- This is twice the average rank, counted from the middle.
CREATE MACRO _wins(entries) AS list_transform(
    [{'up': list_sort(entries), 'down': list_reverse_sort(entries)}],
    lambda ordered: list_transform(entries, lambda one:
        list_position(ordered['up'], one) - list_position(ordered['down'], one)))[1];
COMMENT ON MACRO _wins IS 'For each entry of a list, how many are smaller less how many are larger';

CREATE MACRO _untied(entries) AS list_transform(
    [{'up': list_sort(entries), 'down': list_reverse_sort(entries)}],
    lambda ordered: list_sum(list_transform(entries, lambda one:
        list_position(ordered['up'], one) + list_position(ordered['down'], one) - 2)))[1] / 2;
COMMENT ON MACRO _untied IS 'Number of pairs of entries of a list that differ';

CREATE MACRO _concordance(pairs) AS list_sum(list_transform(pairs, lambda a:
    len(list_filter(pairs, lambda b: a['x'] < b['x'] AND a['y'] < b['y']))
    - len(list_filter(pairs, lambda b: a['x'] < b['x'] AND a['y'] > b['y']))));
COMMENT ON MACRO _concordance IS 'Number of pairs in one order on both sides less those in opposite orders';

-- The correlation of lists with mean 0 is the cosine between them; without spread it is NaN.
CREATE MACRO spearman(x, y) AS nullif(list_transform(
    [list({'x': CAST(x AS DOUBLE), 'y': CAST(y AS DOUBLE)}) FILTER (WHERE x IS NOT NULL AND y IS NOT NULL)],
    lambda pairs: list_cosine_similarity(_wins(_xs(pairs)), _wins(_ys(pairs))))[1], CAST('nan' AS DOUBLE));
COMMENT ON MACRO spearman IS 'Rank correlation of two columns; ties have their average rank';

CREATE MACRO kendall(x, y) AS list_transform(
    [list({'x': CAST(x AS DOUBLE), 'y': CAST(y AS DOUBLE)}) FILTER (WHERE x IS NOT NULL AND y IS NOT NULL)],
    lambda pairs: _concordance(pairs) / nullif(sqrt(_untied(_xs(pairs)) * _untied(_ys(pairs))), 0))[1];
COMMENT ON MACRO kendall IS 'Rank correlation τ-b of two columns; compares all pairs of rows';

CREATE MACRO decision_accuracy(predicted, actual) AS list_transform(
    [list({'x': CAST(predicted AS DOUBLE), 'y': CAST(actual AS DOUBLE)}) FILTER (WHERE predicted IS NOT NULL AND actual IS NOT NULL)],
    lambda pairs: 0.5 + _concordance(pairs) / (2 * nullif(_untied(_ys(pairs)), 0)))[1];
COMMENT ON MACRO decision_accuracy IS
    'Share of pairs of rows that are ordered rightly; a predicted tie counts one half, pairs with an actual tie are left out';

-- Of t rows tied at the border with actual values a_1 ≤ … ≤ a_t, of which m are taken, the smallest
-- taken is a_j with probability C(t − j, m − 1) / C(t, m).
CREATE MACRO _smallest_taken(t, m, j) AS exp(
    (lgamma(t - j + 1) - lgamma(t + 1)) - (lgamma(m) - lgamma(m + 1))
    - (lgamma(t - j - m + 2) - lgamma(t - m + 1)));
COMMENT ON MACRO _smallest_taken IS 'Probability that the j-th of t is the smallest of m chosen ones';

CREATE MACRO regret_at(predicted, actual, k) AS list_transform(list_transform(list_transform(
    [list({'x': CAST(predicted AS DOUBLE), 'y': CAST(actual AS DOUBLE)}) FILTER (WHERE predicted IS NOT NULL AND actual IS NOT NULL)],
    lambda pairs: {'pairs': pairs, 'border': list_sort(_xs(pairs))[least(greatest(k, 0), len(pairs))]}),
    lambda sure: {
        'certain': _ys(list_filter(sure['pairs'], lambda pair: pair['x'] < sure['border'])),
        'tied': list_sort(_ys(list_filter(sure['pairs'], lambda pair: pair['x'] = sure['border']))),
        'best': list_min(_ys(sure['pairs']))}),
    lambda found: list_transform(
        [{'t': len(found['tied']), 'm': least(k - len(found['certain']), len(found['tied']))}],
        lambda border: list_sum(list_transform(range(1, border['t'] - border['m'] + 2), lambda j:
            _smallest_taken(border['t'], border['m'], j)
            * (least(found['tied'][j], list_min(found['certain'])) - found['best']))))[1])[1];
COMMENT ON MACRO regret_at IS
    'Best actual value among the k rows with the lowest prediction, less the best of all; the expectation where ties leave the k rows open';

CREATE MACRO paired_difference(x, y) AS avg(CAST(x AS DOUBLE) - CAST(y AS DOUBLE));
COMMENT ON MACRO paired_difference IS 'Mean of x - y';

CREATE MACRO paired_difference_error(x, y) AS list_transform(
    [list(CAST(x AS DOUBLE) - CAST(y AS DOUBLE)) FILTER (WHERE x IS NOT NULL AND y IS NOT NULL)],
    lambda differences: list_stddev_samp(differences) / sqrt(len(differences)))[1];
COMMENT ON MACRO paired_difference_error IS 'Standard error of the mean of x - y';
