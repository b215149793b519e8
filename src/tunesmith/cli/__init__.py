"""The verbs, a module for each noun: parse, call one function, print."""
