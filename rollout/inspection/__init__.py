"""`blockroll inspect`: a run's samples, token by token, as one HTML page that needs no server and no network.

Knows the lines of samples (`rollout.sample_lines`) and the figures of a run's steps. Does not know who wrote them.

`run` finds and reads a run's files, also while they grow. `samples` checks a line, `origins` says from its trace how each token
was made, `pieces` gives tokens their text, `entropy` recomputes p. `payload` packs all of it for the page, `page` puts page and
payload into one file, `inspect` is the command. `page/` holds the page itself: HTML, CSS and JavaScript without dependencies.
"""
