-- How rows of a table are taken from a batch, where a plain insert is not right.

-- name: objects
-- Several records may name one object; the result does not depend on their order.
INSERT INTO objects BY NAME
SELECT digest, max(bytes) AS bytes, min(kind) AS kind FROM batch GROUP BY digest
ON CONFLICT DO UPDATE SET bytes = greatest(bytes, excluded.bytes), kind = least(kind, excluded.kind);
