"""That a merged model is the base model with the adapter, by weights and by behaviour."""
