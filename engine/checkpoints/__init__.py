"""A training that survives what ends it: folders that are whole or absent, state without pickle, signals."""
