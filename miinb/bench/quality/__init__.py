"""Quality against speed: what int8, int4 and their like cost a model, and what they gain.

`quality.measure(MODEL)`, or `python -m miinb.bench.quality MODEL`, loads the optimized engine once for each arm,
measures its perplexity on a text and its speed with one request at a time, and gives `Runs`: `charts.quality`
draws them, `quality.table` has a row an arm.

`planning` checks everything before anything starts, `texts` has the text, `measuring` runs the arms and compares them;
`engine_side` (it alone imports the engine) runs one in a process of `headline.isolation`, `jobs` go there.
"""

from miinb.bench.quality.measuring import DTYPES, measure, table
from miinb.bench.quality.texts import licenses

__all__ = ["DTYPES", "licenses", "measure", "table"]
