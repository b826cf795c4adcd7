"""The judge: what the inline models can't settle is read by a language model, away from the request path.

types.py is what all parts speak of; render.py turns an escalation into prompts; model.py asks a CTranslate2 model for
one label; store/ keeps escalations and decisions; verdicts.py says what a judgement may lead to.
"""
