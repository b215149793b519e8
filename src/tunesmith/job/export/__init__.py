"""A proven merged model in other formats; reading and writing GGUF."""
