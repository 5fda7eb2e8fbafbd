"""Tasks: a module for each option of task=, max_batch.py for task=max-batch, with a YAML file of its settings.

A task's module has

    Settings            a dataclass: name, and what conf/task/<name>.yaml sets
    run(config)         does it and returns the records it made

and, where it has a use for them,

    check(config)       raise a UserError for settings that cannot be
    folder(config)      the folder under results/runs that it writes; one without has no records of its own
    settings_of(config) what else decides its number, for the column `settings` of its records
    COUNTS = True       it needs no GPU where there is one
    in_turns(config, stopping)   as run, while other runs have turns between the steps of this one
"""
