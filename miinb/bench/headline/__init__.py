"""The headline: this engine against plain transformers on equal work, every figure from one command.

`python -m miinb.bench.headline` runs the arms one after another: random weights of public configurations, greedy, warm,
engines in process (no server, but for the suite that measures it). Each suite and model is one run on disk, written as
soon as an arm has ended, and `--charts` draws it.

`suites` says what is run, `arms` runs it (it alone imports the engine), in the process that `isolation` keeps; `floors`
has what the hardware would allow, `book` the records, `table` the result as text.
"""
