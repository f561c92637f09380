"""Comparison runs: the same weights, prompts and sampling in every mode, measured side by side.

Users call `hybridgen.compare` (or `hybridgen compare` on the command line). This package has another name than that
function, because a submodule `hybridgen.compare` would take the function's place.

    data/       what is compared and what comes out, as plain values: config, schedule, statistics, checks, results
    measuring/  the runs: engines and baselines, warm-up, rounds, what goes wrong meanwhile
    render/     results as tables, plots, a page, and files
    run         a comparison from start to end
    results     `Comparison`, which is a result with its tables, and `read`
    config      `CompareConfig` under its documented name

Imports go from `measuring` and `render` to `data`; neither of the two knows the other.
"""
