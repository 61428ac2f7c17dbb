"""The parity ladder: how far two forms of the same model are apart."""
