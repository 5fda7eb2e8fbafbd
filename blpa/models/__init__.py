"""Networks, written once for every mode."""
