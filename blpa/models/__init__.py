"""Networks whose layers come from a factory, stock or coded."""
