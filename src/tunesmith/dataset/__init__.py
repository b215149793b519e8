"""Training data: read it, check it against LLaMA-Factory's rules, register it.

reading  bytes -> rows with their lines, and every fault of syntax
entry    one entry of dataset_info.json, read as LLaMA-Factory reads it
columns  what holds for a file as a whole: columns named, unknown, of mixed types
alpaca   what holds for a row of instruction, input, output
sharegpt what holds for a row of messages
check    one file -> one report with all faults
detect   rows -> the entry that describes them
registry dataset_info.json: look up, check, register
prompts  the questions asked before and after training
"""
