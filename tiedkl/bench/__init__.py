"""`tiedkl bench`: memory and throughput of the loss beside every peer, each checked against float64.

shapes.py       heads of real models, workloads, sweeps      targets.py    text, Zipf, uniform, or a file
candidates.py   tiedkl, eager, torch.compile                 peers.py      other libraries' losses
steps.py        one repetition: inputs, error, time, memory  measure.py    all candidates on one workload
runner.py       all workloads within the time there is       store.py      JSON and CSV
figures.py      medians, floors, ratios                      against.py    beside an older result
table.py        for the terminal
plots.py        log-log curves and bars                      page.py       one HTML page
"""
