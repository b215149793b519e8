"""A proven merged model in other formats; GGUF written and read."""
