-- The catalog's tables. They are a picture of the journal and can be rebuilt from it at any time,
-- so there are no migrations: change them freely and raise SCHEMA_VERSION in poolreg/store/indexing.py.
-- Keys are single columns; there are no foreign keys. Tables that grow with every mixture have no
-- key: its index would take longer than all else, and indexing lets in each id once as it is.

CREATE TABLE catalog_info (schema_version INTEGER);
COMMENT ON TABLE catalog_info IS 'One row: the version of this schema';
COMMENT ON COLUMN catalog_info.schema_version IS 'A catalog of another version is rebuilt';

CREATE TABLE journal_segments (segment VARCHAR PRIMARY KEY, indexed_bytes BIGINT, seen_bytes BIGINT);
COMMENT ON TABLE journal_segments IS 'How far each journal segment is in this catalog';
COMMENT ON COLUMN journal_segments.segment IS 'File name under journal/';
COMMENT ON COLUMN journal_segments.indexed_bytes IS 'Offset after the last record that is in the catalog';
COMMENT ON COLUMN journal_segments.seen_bytes IS 'Size of the segment then (larger when a torn line ends it)';

CREATE TABLE objects (digest VARCHAR, bytes BIGINT, kind VARCHAR);
COMMENT ON TABLE objects IS 'Every object that a record names';
COMMENT ON COLUMN objects.digest IS 'sha256 of the bytes, and the name under objects/';
COMMENT ON COLUMN objects.bytes IS 'Size in bytes';
COMMENT ON COLUMN objects.kind IS 'Kind of the first record that names it';

CREATE TABLE names (record VARCHAR PRIMARY KEY, space VARCHAR, name VARCHAR, target VARCHAR, parent VARCHAR, added TIMESTAMP, current BOOLEAN);
COMMENT ON TABLE names IS 'Every naming ever made; the last one of a name is current';
COMMENT ON COLUMN names.record IS 'Record id';
COMMENT ON COLUMN names.space IS 'partition, model or evalset';
COMMENT ON COLUMN names.name IS 'The name';
COMMENT ON COLUMN names.target IS 'Digest that it names';
COMMENT ON COLUMN names.parent IS 'Name of the parent partition or group, if any';
COMMENT ON COLUMN names.added IS 'UTC time of naming';
COMMENT ON COLUMN names.current IS 'Whether this is the name''s present meaning';

CREATE TABLE removals (record VARCHAR PRIMARY KEY, kind VARCHAR, target VARCHAR, removed BOOLEAN, added TIMESTAMP);
COMMENT ON TABLE removals IS 'Tombstones and restorations; the last one counts';
COMMENT ON COLUMN removals.record IS 'Record id';
COMMENT ON COLUMN removals.kind IS 'partition, model or evalset';
COMMENT ON COLUMN removals.target IS 'Digest that was removed or restored';
COMMENT ON COLUMN removals.removed IS 'false when it was restored';
COMMENT ON COLUMN removals.added IS 'UTC time';

CREATE TABLE partitions (digest VARCHAR PRIMARY KEY, content VARCHAR, documents BIGINT, bytes BIGINT, units INTEGER, duplicates BIGINT, added TIMESTAMP, removed BOOLEAN);
COMMENT ON TABLE partitions IS 'Named parts of the training corpus';
COMMENT ON COLUMN partitions.digest IS 'Digest of the content and of how it is cut into base units';
COMMENT ON COLUMN partitions.content IS 'Object with the 32-byte digests of its documents, in order';
COMMENT ON COLUMN partitions.documents IS 'Number of documents';
COMMENT ON COLUMN partitions.bytes IS 'UTF-8 bytes of text';
COMMENT ON COLUMN partitions.units IS 'Number of base units';
COMMENT ON COLUMN partitions.duplicates IS 'Documents that stand in it more than once';
COMMENT ON COLUMN partitions.added IS 'UTC time of adding';
COMMENT ON COLUMN partitions.removed IS 'Whether it is tombstoned';

CREATE TABLE partition_files (record VARCHAR, partition VARCHAR, position INTEGER, path VARCHAR, bytes BIGINT, sha256 VARCHAR, documents BIGINT, field VARCHAR, added TIMESTAMP);
COMMENT ON TABLE partition_files IS 'Where a partition''s text lies on this machine';
COMMENT ON COLUMN partition_files.record IS 'Record id';
COMMENT ON COLUMN partition_files.partition IS 'Partition digest';
COMMENT ON COLUMN partition_files.position IS 'Order of the file in the partition';
COMMENT ON COLUMN partition_files.path IS 'Absolute path';
COMMENT ON COLUMN partition_files.bytes IS 'Size of the file';
COMMENT ON COLUMN partition_files.sha256 IS 'sha256 of the file';
COMMENT ON COLUMN partition_files.documents IS 'Documents in the file';
COMMENT ON COLUMN partition_files.field IS 'Field that holds the text in JSON lines and Parquet files';
COMMENT ON COLUMN partition_files.added IS 'UTC time of adding; only the latest place is kept';

CREATE TABLE units (digest VARCHAR PRIMARY KEY, partition VARCHAR, unit INTEGER, documents BIGINT, bytes BIGINT);
COMMENT ON TABLE units IS 'Base units: equal slices of partitions, one model is trained on each';
COMMENT ON COLUMN units.digest IS 'Digest of the unit';
COMMENT ON COLUMN units.partition IS 'Partition digest';
COMMENT ON COLUMN units.unit IS 'Number of the unit in its partition, from 1';
COMMENT ON COLUMN units.documents IS 'Documents, or pieces of cut documents';
COMMENT ON COLUMN units.bytes IS 'UTF-8 bytes of text';

CREATE TABLE evalsets (digest VARCHAR PRIMARY KEY, object VARCHAR, content VARCHAR, documents BIGINT, bytes BIGINT, added TIMESTAMP, removed BOOLEAN);
COMMENT ON TABLE evalsets IS 'Texts to measure on';
COMMENT ON COLUMN evalsets.digest IS 'Digest of the documents in order';
COMMENT ON COLUMN evalsets.object IS 'Object with the documents, one JSON string a line';
COMMENT ON COLUMN evalsets.content IS 'Object with the 32-byte digests of the documents';
COMMENT ON COLUMN evalsets.documents IS 'Number of documents';
COMMENT ON COLUMN evalsets.bytes IS 'UTF-8 bytes of text';
COMMENT ON COLUMN evalsets.added IS 'UTC time of adding';
COMMENT ON COLUMN evalsets.removed IS 'Whether it is tombstoned';

CREATE TABLE contamination (record VARCHAR PRIMARY KEY, evalset VARCHAR, partition VARCHAR, documents BIGINT, added TIMESTAMP);
COMMENT ON TABLE contamination IS 'Evalset documents that also stand in a training partition';
COMMENT ON COLUMN contamination.record IS 'Record id';
COMMENT ON COLUMN contamination.evalset IS 'Evalset digest';
COMMENT ON COLUMN contamination.partition IS 'Partition digest';
COMMENT ON COLUMN contamination.documents IS 'How many of the evalset''s documents stand in the partition';
COMMENT ON COLUMN contamination.added IS 'UTC time of adding';

CREATE TABLE models (digest VARCHAR PRIMARY KEY, model_type VARCHAR, parameters BIGINT, bytes BIGINT, dtype VARCHAR, tokenizer VARCHAR, context_length INTEGER, vocab_size INTEGER, trusted_code BOOLEAN, added TIMESTAMP, removed BOOLEAN);
COMMENT ON TABLE models IS 'Checkpoints: what the bytes are; what they were trained on stands in runs';
COMMENT ON COLUMN models.digest IS 'Digest of tensors, configuration and tokenizer';
COMMENT ON COLUMN models.model_type IS 'Architecture, as in config.json';
COMMENT ON COLUMN models.parameters IS 'Number of floating-point values stored';
COMMENT ON COLUMN models.bytes IS 'Bytes of all tensors';
COMMENT ON COLUMN models.dtype IS 'Storage dtype that holds most bytes';
COMMENT ON COLUMN models.tokenizer IS 'Tokenizer digest';
COMMENT ON COLUMN models.context_length IS 'Longest context of the architecture, tokens';
COMMENT ON COLUMN models.vocab_size IS 'Size of the vocabulary';
COMMENT ON COLUMN models.trusted_code IS 'Whether it was added with --trust-code';
COMMENT ON COLUMN models.added IS 'UTC time of adding';
COMMENT ON COLUMN models.removed IS 'Whether it is tombstoned';

CREATE TABLE model_files (model VARCHAR, role VARCHAR, name VARCHAR, object VARCHAR, bytes BIGINT);
COMMENT ON TABLE model_files IS 'The files of each model';
COMMENT ON COLUMN model_files.model IS 'Model digest';
COMMENT ON COLUMN model_files.role IS 'weights, config or tokenizer';
COMMENT ON COLUMN model_files.name IS 'File name in the model''s folder';
COMMENT ON COLUMN model_files.object IS 'Object digest';
COMMENT ON COLUMN model_files.bytes IS 'Size in bytes';

CREATE TABLE model_tensors (model VARCHAR, name VARCHAR, dtype VARCHAR, shape BIGINT[], sha256 VARCHAR);
COMMENT ON TABLE model_tensors IS 'The tensors of each model';
COMMENT ON COLUMN model_tensors.model IS 'Model digest';
COMMENT ON COLUMN model_tensors.name IS 'Tensor name on disk';
COMMENT ON COLUMN model_tensors.dtype IS 'Storage dtype';
COMMENT ON COLUMN model_tensors.shape IS 'Shape';
COMMENT ON COLUMN model_tensors.sha256 IS 'sha256 of the values';

CREATE TABLE runs (digest VARCHAR PRIMARY KEY, model VARCHAR, role VARCHAR, seed VARCHAR, blend VARCHAR, mixture VARCHAR, scheme VARCHAR, budget VARCHAR, how VARCHAR, tokens BIGINT, steps BIGINT, seconds DOUBLE, final_loss DOUBLE, recipe JSON, added TIMESTAMP);
COMMENT ON TABLE runs IS 'How models came to be: trained here, or added with what the user said of them';
COMMENT ON COLUMN runs.digest IS 'Digest of the facts';
COMMENT ON COLUMN runs.model IS 'Model digest';
COMMENT ON COLUMN runs.role IS 'seed, unit, reference, variant or other';
COMMENT ON COLUMN runs.seed IS 'Digest of the seed model that training started from';
COMMENT ON COLUMN runs.blend IS 'Digest of the exact weights over base units that it was trained on';
COMMENT ON COLUMN runs.mixture IS 'The mixture as an expression, at the time';
COMMENT ON COLUMN runs.scheme IS 'micro or macro, for references';
COMMENT ON COLUMN runs.budget IS 'sum (of the units'' tokens) or same (as one unit), for references';
COMMENT ON COLUMN runs.how IS 'trained, added or compressed';
COMMENT ON COLUMN runs.tokens IS 'Tokens trained on';
COMMENT ON COLUMN runs.steps IS 'Optimizer steps';
COMMENT ON COLUMN runs.seconds IS 'Wall time';
COMMENT ON COLUMN runs.final_loss IS 'Mean training loss over the last steps, nats a token';
COMMENT ON COLUMN runs.recipe IS 'Hyperparameters';
COMMENT ON COLUMN runs.added IS 'UTC time';

CREATE TABLE model_units (run VARCHAR, model VARCHAR, unit VARCHAR, tokens BIGINT, epochs DOUBLE);
COMMENT ON TABLE model_units IS 'Which base units a model was trained on';
COMMENT ON COLUMN model_units.run IS 'Run digest';
COMMENT ON COLUMN model_units.model IS 'Model digest';
COMMENT ON COLUMN model_units.unit IS 'Unit digest';
COMMENT ON COLUMN model_units.tokens IS 'Tokens of the unit that were trained on, if known';
COMMENT ON COLUMN model_units.epochs IS 'Passes over the unit, if known';

CREATE TABLE recipes (digest VARCHAR, components INTEGER, added TIMESTAMP);
COMMENT ON TABLE recipes IS 'Exact weighted averages of models; one component of weight 1 is that model itself';
COMMENT ON COLUMN recipes.digest IS 'Digest of models, weights and merge method';
COMMENT ON COLUMN recipes.components IS 'Number of models';
COMMENT ON COLUMN recipes.added IS 'UTC time of adding';

CREATE TABLE recipe_components (recipe VARCHAR, model VARCHAR, numerator BIGINT, denominator BIGINT, weight DOUBLE);
COMMENT ON TABLE recipe_components IS 'The models of each recipe with their weights';
COMMENT ON COLUMN recipe_components.recipe IS 'Recipe digest';
COMMENT ON COLUMN recipe_components.model IS 'Model digest';
COMMENT ON COLUMN recipe_components.numerator IS 'Exact weight, numerator';
COMMENT ON COLUMN recipe_components.denominator IS 'Exact weight, denominator';
COMMENT ON COLUMN recipe_components.weight IS 'The weight as a double';

CREATE TABLE mixtures (digest VARCHAR, mixture VARCHAR, scheme VARCHAR, seed VARCHAR, subject VARCHAR, blend VARCHAR, size INTEGER, unit_tokens BIGINT, origin VARCHAR, added TIMESTAMP);
COMMENT ON TABLE mixtures IS 'Mixtures that were asked for, and the recipe that stands for each';
COMMENT ON COLUMN mixtures.digest IS 'Digest of weights, scheme and recipe';
COMMENT ON COLUMN mixtures.mixture IS 'Canonical expression, at the time';
COMMENT ON COLUMN mixtures.scheme IS 'micro or macro (micro where both are the same average)';
COMMENT ON COLUMN mixtures.seed IS 'Seed model of its models';
COMMENT ON COLUMN mixtures.subject IS 'Recipe digest, or model digest for a single model';
COMMENT ON COLUMN mixtures.blend IS 'Digest of the exact weights over base units';
COMMENT ON COLUMN mixtures.size IS 'Number of partitions in it';
COMMENT ON COLUMN mixtures.unit_tokens IS 'Tokens that its unit models were trained on together, if known';
COMMENT ON COLUMN mixtures.origin IS 'design, adaptive or holdout';
COMMENT ON COLUMN mixtures.added IS 'UTC time of first asking';

CREATE TABLE mixture_weights (mixture VARCHAR, partition VARCHAR, unit INTEGER, numerator BIGINT, denominator BIGINT, weight DOUBLE);
COMMENT ON TABLE mixture_weights IS 'Canonical weights of each mixture over partitions or single units';
COMMENT ON COLUMN mixture_weights.mixture IS 'Mixture digest';
COMMENT ON COLUMN mixture_weights.partition IS 'Partition digest';
COMMENT ON COLUMN mixture_weights.unit IS 'Unit number, or 0 for the whole partition';
COMMENT ON COLUMN mixture_weights.numerator IS 'Exact weight, numerator';
COMMENT ON COLUMN mixture_weights.denominator IS 'Exact weight, denominator';
COMMENT ON COLUMN mixture_weights.weight IS 'The weight as a double';

CREATE TABLE protocols (digest VARCHAR PRIMARY KEY, max_length INTEGER, dtype VARCHAR, prefix VARCHAR, tokenizer VARCHAR, window_rule VARCHAR, version INTEGER, added TIMESTAMP);
COMMENT ON TABLE protocols IS 'How text was scored; rows of different protocols are not comparable';
COMMENT ON COLUMN protocols.digest IS 'Protocol digest';
COMMENT ON COLUMN protocols.max_length IS 'Window length, tokens';
COMMENT ON COLUMN protocols.dtype IS 'Compute dtype';
COMMENT ON COLUMN protocols.prefix IS 'Which token stands before a document as unscored context';
COMMENT ON COLUMN protocols.tokenizer IS 'Tokenizer digest';
COMMENT ON COLUMN protocols.window_rule IS 'How documents are cut into windows';
COMMENT ON COLUMN protocols.version IS 'Version of the rules';
COMMENT ON COLUMN protocols.added IS 'UTC time of adding';

CREATE TABLE evaluations (digest VARCHAR, subject VARCHAR, evalset VARCHAR, protocol VARCHAR, nll DOUBLE, tokens BIGINT, bytes BIGINT, documents BIGINT, seconds DOUBLE, device VARCHAR, document_scores VARCHAR, token_scores VARCHAR, added TIMESTAMP);
COMMENT ON TABLE evaluations IS 'Measured sums of a model or recipe on an evalset under a protocol';
COMMENT ON COLUMN evaluations.digest IS 'Digest of subject, evalset and protocol: the memo key';
COMMENT ON COLUMN evaluations.subject IS 'Model or recipe digest';
COMMENT ON COLUMN evaluations.evalset IS 'Evalset digest';
COMMENT ON COLUMN evaluations.protocol IS 'Protocol digest';
COMMENT ON COLUMN evaluations.nll IS 'Sum of negative log-likelihoods, nats';
COMMENT ON COLUMN evaluations.tokens IS 'Tokens scored';
COMMENT ON COLUMN evaluations.bytes IS 'UTF-8 bytes scored';
COMMENT ON COLUMN evaluations.documents IS 'Documents scored';
COMMENT ON COLUMN evaluations.seconds IS 'Wall time of the evaluation';
COMMENT ON COLUMN evaluations.device IS 'Device it ran on';
COMMENT ON COLUMN evaluations.document_scores IS 'Object with the sums of each document';
COMMENT ON COLUMN evaluations.token_scores IS 'Object with the negative log-likelihood of each token, for single models';
COMMENT ON COLUMN evaluations.added IS 'UTC time';

CREATE TABLE laps (digest VARCHAR, subject VARCHAR, evalset VARCHAR, protocol VARCHAR, lap INTEGER, nll DOUBLE, tokens BIGINT, bytes BIGINT, documents BIGINT, seconds DOUBLE, device VARCHAR, document_scores VARCHAR, added TIMESTAMP);
COMMENT ON TABLE laps IS 'Measured sums of a part of an evalset, for races; see the view raced';
COMMENT ON COLUMN laps.digest IS 'Digest of subject, evalset, protocol and lap';
COMMENT ON COLUMN laps.subject IS 'Model or recipe digest';
COMMENT ON COLUMN laps.evalset IS 'Evalset digest';
COMMENT ON COLUMN laps.protocol IS 'Protocol digest';
COMMENT ON COLUMN laps.lap IS 'Which part of the documents, from 0: each has as many as all before it';
COMMENT ON COLUMN laps.nll IS 'Sum of negative log-likelihoods, nats';
COMMENT ON COLUMN laps.tokens IS 'Tokens scored';
COMMENT ON COLUMN laps.bytes IS 'UTF-8 bytes scored';
COMMENT ON COLUMN laps.documents IS 'Documents scored';
COMMENT ON COLUMN laps.seconds IS 'Wall time';
COMMENT ON COLUMN laps.device IS 'Device it ran on';
COMMENT ON COLUMN laps.document_scores IS 'Object with the sums of each document, in the order of the race';
COMMENT ON COLUMN laps.added IS 'UTC time';

CREATE TABLE calibrations (digest VARCHAR PRIMARY KEY, subject VARCHAR, text VARCHAR, text_kind VARCHAR, protocol VARCHAR, token_limit BIGINT, tokens BIGINT, held_out_tokens BIGINT, largest INTEGER, condition DOUBLE, windows VARCHAR, layers VARCHAR[], seconds DOUBLE, added TIMESTAMP);
COMMENT ON TABLE calibrations IS 'Statistics of activations, gathered once for a model and a text';
COMMENT ON COLUMN calibrations.digest IS 'Digest of subject, text, protocol and token limit';
COMMENT ON COLUMN calibrations.subject IS 'Model or recipe digest';
COMMENT ON COLUMN calibrations.text IS 'Digest of the evalset or partition';
COMMENT ON COLUMN calibrations.text_kind IS 'evalset or partition';
COMMENT ON COLUMN calibrations.protocol IS 'Protocol digest: window length, tokenizer, compute dtype';
COMMENT ON COLUMN calibrations.token_limit IS 'Tokens asked for';
COMMENT ON COLUMN calibrations.tokens IS 'Tokens in the Gram matrices';
COMMENT ON COLUMN calibrations.held_out_tokens IS 'Tokens kept out of them, on which fits are judged';
COMMENT ON COLUMN calibrations.largest IS 'Side of the largest Gram matrix';
COMMENT ON COLUMN calibrations.condition IS 'Largest condition number of a Gram matrix, NULL if one is singular';
COMMENT ON COLUMN calibrations.windows IS 'Object with the token ids of held-out windows';
COMMENT ON COLUMN calibrations.layers IS 'Objects with the statistics of each layer';
COMMENT ON COLUMN calibrations.seconds IS 'Wall time';
COMMENT ON COLUMN calibrations.added IS 'UTC time';

CREATE TABLE variants (digest VARCHAR PRIMARY KEY, model VARCHAR, parent VARCHAR, parent_label VARCHAR, method VARCHAR, target VARCHAR, ratio DOUBLE, achieved DOUBLE, without VARCHAR[], epsilon DOUBLE, step INTEGER, sequential BOOLEAN, calibration VARCHAR, block_parameters BIGINT, parent_block_parameters BIGINT, parent_parameters BIGINT, parent_bytes BIGINT, shared_bytes BIGINT, logit_difference DOUBLE, seconds DOUBLE, added TIMESTAMP);
COMMENT ON TABLE variants IS 'Compressed models: what they were made from and how';
COMMENT ON COLUMN variants.digest IS 'Digest of the request';
COMMENT ON COLUMN variants.model IS 'Model digest';
COMMENT ON COLUMN variants.parent IS 'Digest of the model or recipe that was compressed';
COMMENT ON COLUMN variants.parent_label IS 'Its name or expression, at the time';
COMMENT ON COLUMN variants.method IS 'poolreg or modegpt';
COMMENT ON COLUMN variants.target IS 'full, portable or stock';
COMMENT ON COLUMN variants.ratio IS 'Share of the block parameters to remove, as asked';
COMMENT ON COLUMN variants.achieved IS 'Share of the block parameters removed';
COMMENT ON COLUMN variants.without IS 'Ingredients of the method that were left out';
COMMENT ON COLUMN variants.epsilon IS 'Temperature of the allocation over layers (modegpt)';
COMMENT ON COLUMN variants.step IS 'What MLP widths are multiples of, if it was said';
COMMENT ON COLUMN variants.sequential IS 'Whether layers were measured behind the compressed ones before them';
COMMENT ON COLUMN variants.calibration IS 'Calibration digest';
COMMENT ON COLUMN variants.block_parameters IS 'Parameters of attention and MLPs that are left';
COMMENT ON COLUMN variants.parent_block_parameters IS 'Parameters of attention and MLPs before';
COMMENT ON COLUMN variants.parent_parameters IS 'Parameters of the whole parent';
COMMENT ON COLUMN variants.parent_bytes IS 'Bytes of the parent''s tensors';
COMMENT ON COLUMN variants.shared_bytes IS 'Bytes of its weight files that stood in the store before';
COMMENT ON COLUMN variants.logit_difference IS 'Largest difference between the logits of the stored model and of the one in memory, relative to the largest logit';
COMMENT ON COLUMN variants.seconds IS 'Wall time of making it, without calibration and analysis';
COMMENT ON COLUMN variants.added IS 'UTC time';

CREATE TABLE variant_modules (variant VARCHAR, layer INTEGER, part VARCHAR, size INTEGER, kept INTEGER, parameters BIGINT, kept_parameters BIGINT, predicted_error DOUBLE, error DOUBLE);
COMMENT ON TABLE variant_modules IS 'What each part of each layer of a variant came to';
COMMENT ON COLUMN variant_modules.variant IS 'Digest of the request';
COMMENT ON COLUMN variant_modules.layer IS 'Layer, from 0';
COMMENT ON COLUMN variant_modules.part IS 'mlp (width), pairs (rotated query/key pairs a head), passing (unrotated query/key channels a head) or values (value channels a head)';
COMMENT ON COLUMN variant_modules.size IS 'Size before';
COMMENT ON COLUMN variant_modules.kept IS 'Size after';
COMMENT ON COLUMN variant_modules.parameters IS 'Parameters before';
COMMENT ON COLUMN variant_modules.kept_parameters IS 'Parameters after';
COMMENT ON COLUMN variant_modules.predicted_error IS 'Error predicted from the calibration: nats per token where the method probes, else as in error';
COMMENT ON COLUMN variant_modules.error IS 'Mean squared change of the residual stream relative to its own, on held-out tokens';

CREATE TABLE task_scores (digest VARCHAR PRIMARY KEY, subject VARCHAR, measure VARCHAR, task VARCHAR, metric VARCHAR, filter VARCHAR, value DOUBLE, stderr DOUBLE, higher_is_better BOOLEAN, n_shot INTEGER, samples BIGINT, sample_limit DOUBLE, task_hash VARCHAR, task_version VARCHAR, harness VARCHAR, harness_version VARCHAR, measured TIMESTAMP, request VARCHAR, added TIMESTAMP);
COMMENT ON TABLE task_scores IS 'Scores of models and recipes on the tasks of another harness, imported or run here; task_results has the latest ones';
COMMENT ON COLUMN task_scores.digest IS 'Digest of all that the score says, so that importing a file twice changes nothing';
COMMENT ON COLUMN task_scores.subject IS 'Model or recipe digest';
COMMENT ON COLUMN task_scores.measure IS 'Digest of harness, task, metric, filter, n_shot, task_hash, task_version and sample_limit: values with one measure can be compared';
COMMENT ON COLUMN task_scores.task IS 'Name of the task or group of tasks';
COMMENT ON COLUMN task_scores.metric IS 'Name of the metric, such as acc_norm';
COMMENT ON COLUMN task_scores.filter IS 'Filter that answers went through; none for none';
COMMENT ON COLUMN task_scores.value IS 'The score';
COMMENT ON COLUMN task_scores.stderr IS 'Its standard error, where the harness has one';
COMMENT ON COLUMN task_scores.higher_is_better IS 'Whether more is better, where the harness says so';
COMMENT ON COLUMN task_scores.n_shot IS 'Worked examples before each question, where all of a group''s tasks agree';
COMMENT ON COLUMN task_scores.samples IS 'Questions that were asked';
COMMENT ON COLUMN task_scores.sample_limit IS 'The limit that was set on them, a number or a share below 1; NULL: the whole task';
COMMENT ON COLUMN task_scores.task_hash IS 'The harness''s hash of all documents and prompts, where it logged samples; for a group a digest of its tasks'' hashes';
COMMENT ON COLUMN task_scores.task_version IS 'The task''s own version';
COMMENT ON COLUMN task_scores.harness IS 'lm-eval: EleutherAI''s lm-evaluation-harness';
COMMENT ON COLUMN task_scores.harness_version IS 'Its version';
COMMENT ON COLUMN task_scores.measured IS 'UTC time of the measurement, as the harness says';
COMMENT ON COLUMN task_scores.request IS 'Digest of what was asked of the harness here, the memo key; NULL for imported scores';
COMMENT ON COLUMN task_scores.added IS 'UTC time';

CREATE TABLE builds (digest VARCHAR PRIMARY KEY, model VARCHAR, subject VARCHAR, dtype VARCHAR, max_shard_bytes BIGINT, added TIMESTAMP);
COMMENT ON TABLE builds IS 'Merges that are kept as models: what gives their weights again, bit for bit';
COMMENT ON COLUMN builds.digest IS 'Digest of the facts';
COMMENT ON COLUMN builds.model IS 'Model digest';
COMMENT ON COLUMN builds.subject IS 'Recipe that it is the average of';
COMMENT ON COLUMN builds.dtype IS 'Storage dtype that was asked for; NULL: that of the parents';
COMMENT ON COLUMN builds.max_shard_bytes IS 'Size beyond which a new weights file was started';
COMMENT ON COLUMN builds.added IS 'UTC time';

CREATE TABLE transfers (record VARCHAR PRIMARY KEY, direction VARCHAR, place VARCHAR, repo_type VARCHAR, revision VARCHAR, version VARCHAR, records BIGINT, objects BIGINT, bytes BIGINT, added TIMESTAMP);
COMMENT ON TABLE transfers IS 'What was pushed and pulled; stays on this machine';
COMMENT ON COLUMN transfers.record IS 'Record id';
COMMENT ON COLUMN transfers.direction IS 'push or pull';
COMMENT ON COLUMN transfers.place IS 'Repository, URL or bundle';
COMMENT ON COLUMN transfers.repo_type IS 'model or dataset, on the Hub';
COMMENT ON COLUMN transfers.revision IS 'Branch, tag or commit that was asked for, if one was';
COMMENT ON COLUMN transfers.version IS 'Commit of the Hub; empty elsewhere';
COMMENT ON COLUMN transfers.records IS 'Records sent or taken';
COMMENT ON COLUMN transfers.objects IS 'Objects sent or taken';
COMMENT ON COLUMN transfers.bytes IS 'Bytes of those objects';
COMMENT ON COLUMN transfers.added IS 'UTC time';

CREATE TABLE transfer_left (record VARCHAR, object VARCHAR);
COMMENT ON TABLE transfer_left IS 'Objects that records name and that a pull left where they were, or did not find';
COMMENT ON COLUMN transfer_left.record IS 'Record id of the pull';
COMMENT ON COLUMN transfer_left.object IS 'Object digest';

CREATE TABLE trusts (record VARCHAR PRIMARY KEY, model VARCHAR, added TIMESTAMP);
COMMENT ON TABLE trusts IS 'Pulled models whose own Python code was allowed to run; stays on this machine';
COMMENT ON COLUMN trusts.record IS 'Record id';
COMMENT ON COLUMN trusts.model IS 'Model digest';
COMMENT ON COLUMN trusts.added IS 'UTC time';
