"""The ICD-10 domain, in pure Python and numpy: codes and their rules, prompts and answers, training data, scores.

codes                 ATIH's CIM-10 table: labels, hierarchy, chapters, allowed roles
prompts, answers      the conversation: its templates, building and parsing of answers
rules                 coding rules of a file: guide_rules.toml, or a hospital's own
corpus                coded stays from a hospital's tables
splits                train, val and test without leaks between them
near_duplicates       notes that are almost identical
constrained_decoding  answers that contain only codes of the table
predictions           files of gold and predicted codes
metrics               precision, recall, F1, exact match, rule violations
"""
