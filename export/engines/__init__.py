"""What runs an exported graph: one module an engine."""
