"""Before and after a training; predictions; talk in a terminal."""
