"""Proof that a merged model is base model + adapter, by weights and by behaviour."""
