"""What the scripts share. As `shared.name`: what several of them use."""

from experiments.shared.building import (
    COPIES,
    Method,
    branch_options,
    channel_stats,
    check_runs,
    check_step,
    classifiers,
    load_view,
    make_numbers,
    make_recipe,
    parse_methods,
    print_classifiers,
    print_notes,
    source,
    views_of,
)  # fmt: skip
from experiments.shared.flags import CONFIGS, Settings, check_file, first_flags, flags_of_recipe, read_config, refuse, value_of
from experiments.shared.folders import digest, finished_run, identity, method_identity, prepare_out, run_place, slug
from experiments.shared.process import options, raise_diverged, start
from experiments.shared.records import (
    attacked,
    attacked_before,
    attacks_of,
    command_line,
    finished_before,
    read_results,
    record,
    results_of,
    versions,
)  # fmt: skip
from experiments.shared.tested import notes_of

__all__ = [
    "CONFIGS", "COPIES", "Method", "Settings", "attacked", "attacked_before", "attacks_of", "branch_options", "channel_stats",
    "check_file", "check_runs", "check_step", "classifiers", "command_line", "digest", "finished_before", "finished_run",
    "first_flags", "flags_of_recipe", "identity", "load_view", "make_numbers", "make_recipe", "method_identity", "notes_of", "options",
    "parse_methods", "prepare_out", "print_classifiers", "print_notes", "raise_diverged", "read_config", "read_results", "record",
    "refuse", "results_of", "run_place", "slug", "source", "start", "value_of", "versions", "views_of",
]  # fmt: skip
