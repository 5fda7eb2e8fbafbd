"""Turn records into tables, figures and pages."""
