"""CamemBERT (Martin et al., 2019): RoBERTa for French."""

from __future__ import annotations

from miinb.engine.encoder_spec import EncoderPolicy
from miinb.engine.policies import bert, roberta

POLICY = EncoderPolicy("camembert", roberta.body, "roberta.", bert.WEIGHTS, roberta.HEADS, bert.IGNORED)
