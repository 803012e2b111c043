"""Encoders measured: this engine against plain transformers on equal work, same weights, one command.

`python -m miinb.bench.encoders` runs the arms one after another on random weights of public shapes; each suite, model
and task is one run on disk, written as soon as an arm has ended, and `--charts` draws them. Both arms' answers to the
same inputs are compared.

`suites` says what is run. `arms` runs what needs no server (it alone imports the engine), `pipelines` transformers' own
pipelines, both in a process that `headline.isolation` keeps; `sessions` asks a server as a notebook would, `clients`
with many clients at once. `inputs` makes the inputs, `answers` compares answers; `table` and `figures` show the runs.
"""
