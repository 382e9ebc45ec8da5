-- Measures over the stored sums. Sums are stored and ratios are computed, so rows can be added up.
CREATE MACRO perplexity(nll, tokens) AS exp(nll / nullif(tokens, 0));
CREATE MACRO bits_per_byte(nll, bytes) AS nll / (ln(2) * nullif(bytes, 0));
CREATE MACRO loss(nll, tokens) AS nll / nullif(tokens, 0);
