"""``hymba ablate``: variants of one training, over tasks and seeds, to one table.

``settings`` reads the YAML file, ``plan`` makes a run for every variant, task and seed and checks each before the
first trains, ``runner`` gives the runs to ``worker`` processes, ``table`` and ``plots`` put the results together.
"""
