"""Search at test time: many samples of one question, and one answer made of them.

Knows requests, trajectories and texts. Does not know engines, sockets or Ray: whatever makes samples is a
`source.SampleSource`. `engine_source` is one in this process; `trainer_bridge/client/sample_source.py` is one of a service.

`config` says what a search does, `driver.search` runs searches,
`of_prompts.search` is `blockroll.search`. One file per family of methods, each with its formula and source:
`votes` (majority and weighted vote), `best_of_n`, `self_consistency` (a vote that stops early), `beam` (over steps),
`markovian_rsa` (aggregation in rounds), `budget_forcing`. `context` is what a method is given, `spending` counts what a search
spends and holds it to its budget, `candidates` are samples with text, answer and score, `functions` finds answers and scores.
`estimators` has pass@k and majority@k. `sample_file` is `blockroll sample`. Only `of_prompts`, `engine_source` and
`sample_file` need torch.
"""
