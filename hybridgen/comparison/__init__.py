"""Comparison runs: the same weights, prompts and sampling in every mode, measured side by side.

The front door is `hybridgen.compare` (and `hybridgen compare` on the command line), which is why the package has
another name than the function: a submodule's name would take the function's place in `hybridgen`.

    config        what is compared: `CompareConfig`
    schedule      the cells and the order of the runs
    statistics    quantiles, the confidence interval of a median, agreement of tokens
    subjects      what is measured: an engine in a mode, or a baseline
    baselines     adapters of other engines
    measure       warm-up, interleaved runs, faults
    checks        how far logits are from mode eager's
    utilisation   how busy the device is
    provenance    where and with what it was measured
    results       what comes out: `Comparison`
    report, plots, html, files    tables, pictures, a page, and writing them
"""
