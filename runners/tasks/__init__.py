"""Tasks: one module and one YAML file of settings per option of task=, for example max_batch.py for task=max-batch.

A task's module has

    Settings            dataclass of its settings: name, and the keys of conf/task/<name>.yaml
    run(config)         run the task and return the records it made

and, if needed,

    check(config)       raise a UserError for settings that are not allowed
    folder(config)      folder under results/runs that the task writes; a task without one makes no records of its own
    settings_of(config) settings that decide its numbers and have no column of a record
    NEEDS_NO_GPU = True       the task counts and needs no GPU
    STARTS_PROCESSES = True   it is not run in each of several processes, but starts them itself (gpu.processes)
    in_turns(config, stopping)   run, but yield to other runs after each step
"""
