"""Training data: read it, check it against LLaMA-Factory's rules, register it.

reading    bytes -> rows with their places, piece by piece; scan, syntax: JSON and its faults
tables     rows of CSV, Parquet, Arrow, text: read by the training environment
entry      one entry of dataset_info.json, read as LLaMA-Factory reads it
columns    what holds for a file as a whole: columns named, unknown, of mixed kinds
alpaca     what holds for a row of instruction, input, output
sharegpt   what holds for a row of messages
duplicates rows that are the same
quality    what no rule forbids: near_duplicates, personal data (pii), languages
check      one file or folder -> one report with all faults
detect     rows -> the entry that describes them
registry   dataset_info.json: look up, check, register
split      training and validation rows that share nothing
training_job  run a job on data in the training environment
replay_report what LLaMA-Factory made of a config's rows, in words; histogram, overlap, cost
prompts    the questions asked before and after training
"""
