"""The store: the only files that know a database."""
