"""Tasks: one file for each option of task=."""
