"""XLM-RoBERTa (Conneau et al., 2019): RoBERTa with a vocabulary of a hundred languages."""

from __future__ import annotations

from miinb.engine.encoder_spec import EncoderPolicy
from miinb.engine.policies import bert, roberta

POLICY = EncoderPolicy("xlm-roberta", roberta.body, "roberta.", bert.WEIGHTS, roberta.HEADS, bert.IGNORED)
