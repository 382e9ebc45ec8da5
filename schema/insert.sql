-- How rows of a table are taken from a batch, where a plain insert is not right.

-- name: objects
-- Several records may name one object; the result does not depend on their order.
MERGE INTO objects USING (SELECT digest, max(bytes) AS bytes, min(kind) AS kind FROM batch GROUP BY digest) AS new
ON objects.digest = new.digest
WHEN MATCHED THEN UPDATE SET bytes = greatest(objects.bytes, new.bytes), kind = least(objects.kind, new.kind)
WHEN NOT MATCHED THEN INSERT BY NAME;
