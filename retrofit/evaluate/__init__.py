"""What a conversion costs and what it saves: perplexity, keys counted, passkey retrieval."""

from __future__ import annotations

from retrofit.evaluate.account import SiteAccount
from retrofit.evaluate.passkey import PasskeyCell, PasskeyReport, passkey
from retrofit.evaluate.perplexity import EvalReport, Span, evaluate

__all__ = ["EvalReport", "PasskeyCell", "PasskeyReport", "SiteAccount", "Span", "evaluate", "passkey"]
