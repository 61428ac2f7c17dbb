"""Running an exported graph: sessions, batches that come and go, sampling."""
